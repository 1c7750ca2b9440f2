"""A plain install, not an editable one: what it holds, and that it runs from another folder."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = "projects/SSIMKD/ssimkd/"


def tracked():
    """The files of the checkout, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip has installed a copy of the checkout into."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    names = [n for n in tracked() if n.startswith(("projects/", "configs/")) or "/" not in n]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pip += ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True)
    return target


def test_it_holds_the_package_and_the_configs(installed):
    expected = {n[len(PACKAGE) :] for n in tracked() if n.startswith(PACKAGE)}
    expected |= {n for n in tracked() if n.startswith("configs/") and not n.endswith(".md")}
    files = {str(p.relative_to(installed / "ssimkd")) for p in installed.glob("ssimkd/**/*.*")}
    assert {f for f in files if not f.endswith(".pyc")} == expected
    assert (installed / "bin/ssimkd").is_file()


def test_it_finds_its_configs_and_their_teacher_from_another_folder(installed, tmp_path):
    script = (
        "import sys, ssimkd; from ssimkd.engine.arguments import load_config\n"
        "for config in ('shapes/ssimkd.yaml', 'ssimkd_R50.py'): load_config(config, [], ())\n"
        "assert ssimkd.__file__.startswith(sys.argv[1]), ssimkd.__file__\n"
    )
    command = [sys.executable, "-c", script, str(installed)]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_trains_and_evaluates_from_another_folder(installed, tmp_path, few_shapes):
    command = [sys.executable, "-m", "ssimkd", "train", "--config-file", "shapes/ssimkd.yaml"]
    command += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()"]
    env = {**os.environ, "PYTHONPATH": str(installed), "DETECTRON2_DATASETS": few_shapes}
    opts = ["OUTPUT_DIR", str(tmp_path / "out")]
    done = subprocess.run([*command, *opts], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/student.pth").is_file()
