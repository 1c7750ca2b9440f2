"""Runs of train_net.py for compare.py: a process and a folder each, and none done twice."""

import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Dict, Iterable, NamedTuple, Optional, Tuple

import torch
from compare_methods import ROOT
from detectron2.config import CfgNode
from ssimkd.commands.weight import medians, read_rows
from ssimkd.engine.run_record import commit, machine
from ssimkd.errors import ConfigError, as_config_error
from tqdm import tqdm

COSTS = "timing"  # folder of the solo runs
RECORD = "record.json"  # beside run.json, which says how a run was made


class Run(NamedTuple):
    """One process of train_net.py.

    Attributes:
        folder (Path): takes its output; `record.json` there: the run has finished.
        config (str): a file, relative to the repository.
        opts (tuple[str]): overrides of it.
    """

    folder: Path
    config: str
    opts: Tuple[str, ...]

    def settings(self) -> Dict[str, Any]:
        """What a record must agree with: the overrides, and what the file and its bases say."""
        return {"settings": [self.config, *self.opts], "config": digest(self.config)}

    def record(self) -> Optional[Dict[str, Any]]:
        """What a finished run left; None: it has not finished.

        Raises:
            ConfigError: the folder holds a run with other settings.
        """
        path = self.folder / RECORD
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        for key, value in self.settings().items():
            if record.get(key) != value:
                raise ConfigError(
                    f"--out: {self.folder} holds a run of other settings, {record['settings']}, "
                    f"or of another {self.config}: choose another folder"
                )
        return record


class Runner:
    """Carries runs out, several at a time.

    Attributes:
        failed (dict[Path, str]): folder of a run -> last line that it printed; not tried again.
    """

    def __init__(self) -> None:
        self.failed: Dict[Path, str] = {}

    def finish(self, runs: Iterable[Run], title: str, jobs: int) -> None:
        """Carries out what is neither finished nor failed; a failure does not stop the rest."""
        runs = list(runs)
        todo = [run for run in runs if run.folder not in self.failed and run.record() is None]
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc=title, unit="run") as bar:
            bar.update(len(runs) - len(todo))
            running = {pool.submit(execute, run): run for run in todo}
            try:
                for future in as_completed(running):
                    complaint, folder = future.result(), running[future].folder
                    if complaint:
                        self.failed[folder] = complaint
                        bar.write(f"failed: {folder}: {complaint}", file=sys.stderr)
                    bar.update()
            finally:  # interrupted: start no more
                pool.shutdown(wait=False, cancel_futures=True)


def digest(config: str) -> str:
    """Of the values in a file and its bases: not of comments, defaults, nor what the files name."""
    values = CfgNode.load_yaml_with_base(str(ROOT / config))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def restore(records: Path, out: Path) -> None:
    """Takes over finished runs that :func:`gather` has written elsewhere, but not those in `out`.

    Raises:
        ConfigError: the file is not there, or holds something else or runs of other configs.
    """
    with as_config_error(f"--records: {records}", (OSError, ValueError, TypeError, KeyError)):
        found = json.loads(records.read_text())
        drafts = {out / name / RECORD: json.dumps(found[name], indent=2) for name in found}
        for config, known in {(r["settings"][0], r["config"]) for r in found.values()}:
            if known != digest(config):
                raise ValueError(f"its runs are of another {config}")
    for path, text in drafts.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def gather(out: Path) -> None:
    """Writes all finished runs below `out` to one file there, by the names of their folders.

    Those that measured costs are left out: they hold for this machine alone.
    """
    paths = sorted(path for path in out.rglob(RECORD) if path.relative_to(out).parts[0] != COSTS)
    found = {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in paths}
    (out / "records.json").write_text(json.dumps(found, indent=1) + "\n")


def execute(run: Run) -> str:
    """Carries one run out, on one thread, and writes its record.

    Returns:
        str: "", or the last line of its output where it failed.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    # Whoever shares the folder may carry out the same run at the same time
    draft = Path(tempfile.mkdtemp(prefix=f"{run.folder.name}-", dir=run.folder.parent))
    draft.chmod(0o755)
    command = [sys.executable, "train_net.py", "--config-file", run.config]
    command += [*run.opts, "OUTPUT_DIR", str(draft)]
    record = run.settings()
    record.update(commit=commit() or "unknown", machine=f"{machine()}, torch {torch.__version__}")
    with open(draft / "output.txt", "w") as stream:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)  # has this process's own peak memory
        process.returncode = os.waitstatus_to_exitcode(status)
    complaint = ""
    if process.returncode:
        lines = (draft / "output.txt").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        complaint = f"exit status {process.returncode}: {last.strip()}"
    else:
        results = draft / "results.json"
        record["bbox"] = json.loads(results.read_text())["bbox"] if results.exists() else {}
        record["seconds"] = seconds_per_iteration(draft / "metrics.json")
        record["gradient_ratio"] = gradient_ratio(draft / "metrics.json")
        record["peak_mib"] = peak_mib(draft / "log.txt", usage.ru_maxrss)
        (draft / RECORD).write_text(json.dumps(record, indent=2))
    shutil.rmtree(run.folder, ignore_errors=True)  # one that failed before
    draft.rename(run.folder)
    return complaint


def seconds_per_iteration(metrics: Path) -> float:
    """Median of Detectron2's own timer: data, forward, backward and update.

    Its lines are medians of 20 iterations; the first, while caches fill, is left out.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = [line["time"] for line in lines if "time" in line]
    return statistics.median(times[1:] or times or [math.nan])  # none before the third


def gradient_ratio(metrics: Path) -> Optional[float]:
    """What `MODEL.DISTILL.LOG_GRADIENTS` logged, as `ssimkd weight` takes it; None: nothing."""
    return medians(read_rows(metrics)).get("gradient_ratio")


def peak_mib(log: Path, max_rss: int) -> float:
    """Peak memory in MiB: of the GPU where there is one, otherwise of the whole process."""
    on_gpu = re.findall(r"max_mem: (\d+)M", log.read_text())
    if on_gpu:
        return float(max(map(int, on_gpu)))
    return max_rss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
