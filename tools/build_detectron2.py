#!/usr/bin/env python
"""Builds a Detectron2 wheel from the source distribution that the package index carries.

Detectron2 has no official release on the package index. `detectron2-cdo==0.5` has the Python files
and the model zoo of upstream's tag v0.5, but no C++ sources. This script downloads it and checks
its hash. It edits the source for today's libraries (REPLACEMENTS), adds a Python module in place of
the compiled extension, and builds the wheel. It is not needed if Detectron2 is already installed.

    python tools/build_detectron2.py --out build/wheels    # make the wheel
    python tools/build_detectron2.py --install             # and install it, unless there is one
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import List, NamedTuple

NAME, VERSION = "detectron2-cdo", "0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
LOCAL_VERSION = "+python"  # distinguishes this wheel from a compiled Detectron2 in `pip list`


class Replacement(NamedTuple):
    """One edit of the source: the regular expression `old` must match `times` times in `file`."""

    file: str
    old: str
    new: str
    times: int = 1


REPLACEMENTS = [
    # NumPy 1.24 has removed these names.
    Replacement("detectron2/data/build.py", r"np\.int\b", "int", 2),
    Replacement("detectron2/evaluation/sem_seg_evaluation.py", r"np\.int\b", "int", 2),
    Replacement("detectron2/evaluation/sem_seg_evaluation.py", r"np\.float\b", "float", 5),
    Replacement("detectron2/data/datasets/pascal_voc.py", r"np\.str\b", "str"),
    Replacement("detectron2/evaluation/pascal_voc_evaluation.py", r"np\.bool\b", "bool", 2),
    Replacement("detectron2/structures/masks.py", r"np\.bool\b", "bool", 2),
    Replacement("detectron2/utils/visualizer.py", r"np\.bool\b", "bool", 3),
    Replacement("detectron2/utils/video_visualizer.py", r"np\.bool\b", "bool"),
    # Pillow 10 has removed this name.
    Replacement("detectron2/data/transforms/transform.py", r"Image\.LINEAR\b", "Image.BILINEAR"),
    # setuptools 82 no longer contains pkg_resources.
    Replacement(
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources",
        "from importlib import resources",
    ),
    Replacement(
        "detectron2/model_zoo/model_zoo.py",
        r"pkg_resources\.resource_filename\(\s*(.*), os\.path\.join\((.*), config_path\)\s*\)",
        r"str(resources.files(\1) / \2 / config_path)",
    ),
    # The schedulers of torch 2 are no _LRScheduler, so their state was not saved.
    Replacement("detectron2/engine/hooks.py", r"lr_scheduler\._LRS", "lr_scheduler.LRS", 2),
    # The distribution has another name, and no C++ sources: C_STAND_IN takes their place.
    Replacement("setup.py", "detectron2_cdo", "detectron2"),
    Replacement("setup.py", r"ext_modules=.*\s*cmdclass=.*\n", ""),
    # The configs of the zoo already lie inside the package.
    Replacement(
        "setup.py", r"get_model_zoo_configs\(\)\}", '["configs/**/*.yaml", "configs/**/*.py"]}'
    ),
    # These requirements are too old, or were needed only by caffe2.
    Replacement("setup.py", r'"black==.*\n', ""),
    Replacement("setup.py", r"iopath>=0\.1\.7,<0\.1\.10", "iopath>=0.1.7"),
    Replacement("setup.py", r'"(future|pydot)",.*\n', "", 2),
]

C_STAND_IN = '''"""Stands in for the compiled extension; a compiled `_C` takes precedence."""


def get_compiler_version():
    return "none: Detectron2 was installed without its compiled extension"


def get_cuda_version():
    return "none"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise ImportError(
            f"detectron2._C.{name} is compiled code and this Detectron2 was installed without it "
            "(rotated boxes, deformable convolution and the fast COCO evaluation need it). "
            "Install Detectron2 from its repository with a C++ compiler to use it."
        )

    return missing
'''


def download(folder: Path) -> Path:
    """Downloads the source distribution into `folder`. pip checks its hash."""
    # pip runs setup.py to read its metadata, so it has to check the hash before that.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    subprocess.run([*pip, "download", *source, "--require-hashes", "-r", str(pinned)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def apply_replacements(source: Path, replacements: List[Replacement]) -> None:
    """Edits the unpacked source in place.

    Raises:
        SystemExit: a row matches more often or less often than it says.
    """
    for row in replacements:
        path = source / row.file
        text = path.read_text(encoding="utf-8")
        text, found = re.subn(row.old, row.new, text)
        if found != row.times:
            raise SystemExit(f"{row.file}: {row.old!r} matches {found} times, expected {row.times}")
        path.write_text(text, encoding="utf-8")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the source distribution, edits it, and returns its root folder."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:  # early releases of Python 3.9 to 3.11
            tar.extractall(folder)
    (source,) = (p for p in folder.iterdir() if p.is_dir())
    apply_replacements(source, REPLACEMENTS)
    (source / "detectron2" / "_C.py").write_text(C_STAND_IN, encoding="utf-8")
    return source


def build_wheel(out: Path) -> Path:
    """Builds the wheel in the folder `out` and returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        downloads, sources = Path(tmp, "download"), Path(tmp, "source")
        downloads.mkdir()
        sources.mkdir()
        source = unpack(download(downloads), sources)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run(
            [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)],
            check=True,
            env={**os.environ, "D2_VERSION_SUFFIX": LOCAL_VERSION},  # upstream's setup.py reads it
        )
    return out / f"detectron2-{VERSION}{LOCAL_VERSION}-py3-none-any.whl"


def replaceable() -> bool:
    """Whether Detectron2 is not installed, or was built by an earlier run of this script."""
    if importlib.util.find_spec("detectron2") is None:
        return True
    try:
        return importlib.metadata.version("detectron2").endswith(LOCAL_VERSION)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return False


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/wheels"), help="folder of the wheel"
    )
    parser.add_argument(
        "--install", action="store_true", help="install the wheel unless there is another one"
    )
    args = parser.parse_args()
    if args.install and not replaceable():
        print("Detectron2 is already installed and is kept.")
        return
    wheel = build_wheel(args.out)
    print(f"built {wheel}")
    if args.install:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)


if __name__ == "__main__":
    main()
