#!/usr/bin/env python
"""Builds a Detectron2 wheel from the source distribution that the package index carries.

Detectron2 has no official release on the package index. `detectron2-cdo==0.5` is upstream's tag
v0.5, Python files and model zoo, without the C++ sources. This script downloads it, checks its
hash, applies REPLACEMENTS (what a five-year-old source needs on today's libraries), adds a Python
stand-in for the compiled extension and builds the wheel. Nothing here is needed where Detectron2
is installed already.

    python tools/build_detectron2.py --out build/wheels    # make the wheel
    python tools/build_detectron2.py --install             # and install it, unless there is one
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import List, NamedTuple

NAME, VERSION = "detectron2-cdo", "0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
LOCAL_VERSION = "+python"  # pip list then tells this wheel from a compiled Detectron2


class Replacement(NamedTuple):
    """One edit of the source: `old` must occur exactly `times` times in `file`."""

    file: str
    old: str
    new: str
    times: int
    reason: str


NUMPY_124 = "removed in NumPy 1.24"
REPLACEMENTS = [
    Replacement(
        "detectron2/data/transforms/transform.py",
        "interp=Image.LINEAR",
        "interp=Image.BILINEAR",
        1,
        "removed in Pillow 10",
    ),
    Replacement(
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "from importlib import resources\n",
        1,
        "pkg_resources left setuptools in version 82",
    ),
    Replacement(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", '
        'os.path.join("configs", config_path)\n    )',
        'str(\n        resources.files("detectron2.model_zoo") / "configs" / config_path\n    )',
        1,
        "pkg_resources left setuptools in version 82",
    ),
    Replacement(
        "detectron2/engine/hooks.py",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        2,
        "a native scheduler of torch 2 is no _LRScheduler: its state was silently not saved",
    ),
    # The AttributeError of the first two is swallowed upstream: the class table vanishes.
    Replacement("detectron2/data/build.py", "dtype=np.int)", "dtype=int)", 1, NUMPY_124),
    Replacement("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n", 1, NUMPY_124),
    Replacement(
        "detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2, NUMPY_124
    ),
    Replacement(
        "detectron2/evaluation/sem_seg_evaluation.py",
        "dtype=np.float)",
        "dtype=float)",
        2,
        NUMPY_124,
    ),
    Replacement(
        "detectron2/evaluation/sem_seg_evaluation.py",
        "astype(np.float)",
        "astype(float)",
        3,
        NUMPY_124,
    ),
    Replacement(
        "detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)", 1, NUMPY_124
    ),
    Replacement(
        "detectron2/evaluation/pascal_voc_evaluation.py",
        "astype(np.bool)",
        "astype(bool)",
        2,
        NUMPY_124,
    ),
    Replacement("detectron2/structures/masks.py", "astype(np.bool)", "astype(bool)", 1, NUMPY_124),
    Replacement("detectron2/structures/masks.py", "dtype=np.bool)", "dtype=bool)", 1, NUMPY_124),
    Replacement("detectron2/utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3, NUMPY_124),
    Replacement(
        "detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)", 1, NUMPY_124
    ),
    Replacement(
        "setup.py",
        'name="detectron2_cdo"',
        'name="detectron2"',
        1,
        "the import name and upstream's",
    ),
    Replacement(
        "setup.py",
        "    ext_modules=get_extensions(),\n"
        '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n',
        "",
        1,
        "the C++ sources are not in the distribution; detectron2/_C.py stands in",
    ),
    Replacement(
        "setup.py",
        "get_model_zoo_configs()}",
        '["configs/**/*.yaml", "configs/**/*.py"]}',
        1,
        "the zoo's configs already lie inside the package",
    ),
    Replacement(
        "setup.py",
        '        "black==21.4b2",\n',
        "",
        1,
        "only LazyConfig.to_py uses it; too old today",
    ),
    Replacement(
        "setup.py", '"iopath>=0.1.7,<0.1.10"', '"iopath>=0.1.7"', 1, "0.1.10 works and is current"
    ),
    Replacement("setup.py", '        "future",  # used by caffe2\n', "", 1, "caffe2 is gone"),
    Replacement(
        "setup.py", '        "pydot",  # used to save caffe2 SVGs\n', "", 1, "caffe2 is gone"
    ),
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
    """Fetches the pinned source distribution into `folder` and checks its hash."""
    # pip runs the file's setup.py to read its metadata: it must know the hash before that
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    subprocess.run([*pip, "download", *source, "--require-hashes", "-r", str(pinned)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{archive.name}: sha256 is {digest}, expected {SHA256}")
    return archive


def apply_replacements(source: Path, replacements: List[Replacement]) -> None:
    """Edits the unpacked source in place.

    Raises:
        SystemExit: a row's text does not occur in its file exactly as often as the row says.
    """
    for row in replacements:
        path = source / row.file
        text = path.read_text(encoding="utf-8")
        found = text.count(row.old)
        if found != row.times:
            raise SystemExit(f"{row.file}: {row.old!r} occurs {found} times, expected {row.times}")
        path.write_text(text.replace(row.old, row.new), encoding="utf-8")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the source distribution and makes it buildable; returns its root folder."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:  # early patch releases of Python 3.9 to 3.11; the hash was checked
            tar.extractall(folder)
    (source,) = (p for p in folder.iterdir() if p.is_dir())
    apply_replacements(source, REPLACEMENTS)
    (source / "detectron2" / "_C.py").write_text(C_STAND_IN, encoding="utf-8")
    return source


def build_wheel(out: Path) -> Path:
    """Makes the wheel in the folder `out` and returns its path."""
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
            env={**os.environ, "D2_VERSION_SUFFIX": LOCAL_VERSION},  # upstream's own hook
        )
    return out / f"detectron2-{VERSION}{LOCAL_VERSION}-py3-none-any.whl"


def replaceable() -> bool:
    """Whether there is no Detectron2 here, or one that an earlier run of this script made."""
    if importlib.util.find_spec("detectron2") is None:
        return True
    try:
        return importlib.metadata.version("detectron2").endswith(LOCAL_VERSION)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return False


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/wheels"), help="where it is put")
    parser.add_argument("--install", action="store_true", help="also install it, unless present")
    args = parser.parse_args()
    if args.install and not replaceable():
        print("Detectron2 is already installed: kept as it is.")
        return
    wheel = build_wheel(args.out)
    print(f"built {wheel}")
    if args.install:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)


if __name__ == "__main__":
    main()
