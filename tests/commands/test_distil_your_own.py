"""The tutorial runs as it stands, on fewer images and iterations."""

import json
import subprocess
import sys

from conftest import ROOT
from ssimkd.engine.run_record import read_record
from ssimkd.report.run import Run


def test_it_distils_evaluates_and_predicts(few_shapes, tmp_path):
    command = [sys.executable, "tools/distil_your_own.py", "--output", str(tmp_path)]
    command += ["--data", f"{few_shapes}/ssimkd_shapes", "--iterations", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ap = json.loads((tmp_path / "results.json").read_text())["bbox"]["AP"]
    assert f"\nBox AP of the student: {ap:.1f}\n" in done.stdout
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert logged[0]["ssim_kd_loss"] > 0
    assert "Environment info" not in done.stdout and "maxDets" not in done.stdout
    assert "FutureWarning" not in done.stderr
    # what a report needs
    assert str(tmp_path) in Run(str(tmp_path)).cfg.OUTPUT_DIR and read_record(str(tmp_path))
    # what it predicts is said by the class's name
    last = done.stdout.splitlines()[-1].split()
    assert last[0] in ("disk", "ring", "triangle", "cross") and 0 <= float(last[1]) <= 1
