"""Runs of train_net.py for compare.py. Each has its process and folder, and is done only once."""

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
from functools import cache
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from compare_methods import ROOT
from detectron2.config import CfgNode
from ssimkd.checkpoint.reader import sha256
from ssimkd.commands.weight import medians, read_rows
from ssimkd.engine.arguments import load_config
from ssimkd.engine.run_record import commit, machine
from ssimkd.errors import ConfigError, as_config_error
from tqdm import tqdm

TIMING = "timing"  # folder of the timed runs
RECORD = "record.json"  # file with the results of a finished run


class Run(NamedTuple):
    """One process of train_net.py.

    Attributes:
        folder (Path): its output. The run has finished if RECORD is there.
        config (str): path of the config from the root of the repository.
        opts (tuple[str]): overrides of the config.
    """

    folder: Path
    config: str
    opts: Tuple[str, ...]

    def settings(self) -> Dict[str, Any]:
        """The settings that its record must have."""
        return {"settings": [self.config, *self.opts], "config": digest(self.config)}

    def record(self) -> Optional[Dict[str, Any]]:
        """The record of the run, or None if it has not finished.

        Raises:
            ConfigError: the folder holds a run with other settings or of another teacher.
        """
        path = self.folder / RECORD
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        for key, value in self.settings().items():
            if record.get(key) != value:
                raise ConfigError(
                    f"--out: {self.folder} holds a run of other settings, {record['settings']}, "
                    f"or of another {self.config}. Choose another folder."
                )
        teacher = teacher_of(self.config, self.opts)
        if record.get("teacher", teacher) != teacher:
            raise ConfigError(
                f"--out: {self.folder} holds a run with another teacher. Choose another folder, "
                "and leave out --records if they have the run."
            )
        return record


class Runner:
    """Executes several runs at a time.

    Attributes:
        failed (dict[Path, str]): folder of a failed run -> the last line that it printed.
    """

    def __init__(self) -> None:
        self.failed: Dict[Path, str] = {}

    def finish(self, runs: Iterable[Run], title: str, jobs: int) -> None:
        """Executes the runs that have neither finished nor failed; a failure stops no other run."""
        runs = list(runs)
        todo = [run for run in runs if run.folder not in self.failed and run.record() is None]
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc=title, unit="run") as bar:
            bar.update(len(runs) - len(todo))
            running = {pool.submit(execute, run): run for run in todo}
            try:
                for future in as_completed(running):
                    failure, folder = future.result(), running[future].folder
                    if failure:
                        self.failed[folder] = failure
                        bar.write(f"failed: {folder}: {failure}", file=sys.stderr)
                    bar.update()
            finally:  # an interruption starts no more runs
                pool.shutdown(wait=False, cancel_futures=True)

    def exit_if_failed(self) -> None:
        """Ends the script with status 1 if a run failed."""
        if self.failed:
            sys.exit(f"{len(self.failed)} runs failed. The same command tries them again.")


def schedule(iterations: int) -> List[Any]:
    """The overrides for a run of so many iterations: its warm-up and two steps of the rate."""
    last_quarter, last_tenth = (iterations - max(n, iterations // d) for n, d in ((2, 4), (1, 10)))
    steps = ("SOLVER.WARMUP_ITERS", iterations // 10, "SOLVER.STEPS", (last_quarter, last_tenth))
    return ["SOLVER.MAX_ITER", iterations, *steps]


def check_teacher(config: str, opts: Sequence[str]) -> None:
    """Raises ConfigError if the teacher of a config with overrides was not trained yet."""
    teacher = load_config(str(ROOT / config), opts, splits=()).MODEL.DISTILL.TEACHER
    if not (ROOT / teacher.WEIGHTS).exists():
        raise ConfigError(
            f"there is no {teacher.WEIGHTS}. Train this teacher first, in the top folder: "
            f"python train_net.py --config-file {teacher.CONFIG}"
        )


def digest(config: str) -> str:
    """Hash of the values in a config and its bases, without comments and defaults."""
    values = CfgNode.load_yaml_with_base(str(ROOT / config))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@cache
def teacher_of(config: str, opts: Tuple[str, ...]) -> Optional[str]:
    """The SHA-256 of the file with the weights of a run's teacher; None of a run without one."""
    teacher = load_config(str(ROOT / config), opts, splits=()).MODEL.DISTILL.TEACHER
    return sha256(str(ROOT / teacher.WEIGHTS)) if teacher.CONFIG else None


def restore(records: Path, out: Path) -> None:
    """Copies finished runs from a file of :func:`gather` to `out`, except those already there.

    Raises:
        ConfigError: the file cannot be read, or its runs are of other configs.
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
    """Writes the records of all finished runs below `out` to records.json there.

    Timed runs are left out because their times hold only for this machine.
    """
    paths = sorted(path for path in out.rglob(RECORD) if path.relative_to(out).parts[0] != TIMING)
    found = {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in paths}
    (out / "records.json").write_text(json.dumps(found, indent=1) + "\n")


def execute(run: Run) -> str:
    """Executes a run with one thread and writes its record.

    Returns:
        str: "", or the last line of its output if it failed.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    # Another process may execute the same run at the same time.
    draft = Path(tempfile.mkdtemp(prefix=f"{run.folder.name}-", dir=run.folder.parent))
    draft.chmod(0o755)
    command = [sys.executable, "train_net.py", "--config-file", run.config]
    command += [*run.opts, "OUTPUT_DIR", str(draft)]
    record = {**run.settings(), "teacher": teacher_of(run.config, run.opts)}
    record.update(commit=commit() or "unknown", machine=f"{machine()}, torch {torch.__version__}")
    with open(draft / "output.txt", "w") as stream:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)  # usage has the peak memory of the process
        process.returncode = os.waitstatus_to_exitcode(status)
    failure = ""
    if process.returncode:
        lines = (draft / "output.txt").read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        failure = f"exit status {process.returncode}: {last.strip()}"
    else:
        results = draft / "results.json"
        found = json.loads(results.read_text()) if results.exists() else {"bbox": {}}
        if "bbox" not in found:  # several data sets; the last one counts
            record["by_dataset"] = {name: of_data["bbox"] for name, of_data in found.items()}
            *_, found = found.values()
        record["bbox"] = found["bbox"]
        rows = read_rows(draft / "metrics.json")
        record["seconds"] = seconds_per_iteration(rows)
        record["gradient_ratio"] = medians(rows).get("gradient_ratio")
        record["peak_mib"] = peak_mib(draft / "log.txt", usage.ru_maxrss)
        (draft / RECORD).write_text(json.dumps(record, indent=2))
    if (run.folder / RECORD).exists():  # another process has finished it
        shutil.rmtree(draft)
        return ""
    shutil.rmtree(run.folder, ignore_errors=True)  # left by a run that failed
    draft.rename(run.folder)
    return failure


def seconds_per_iteration(rows: List[Dict[str, Any]]) -> float:
    """Median of Detectron2's times of an iteration, without the first one that it logged."""
    times = [row["time"] for row in rows if "time" in row]
    return statistics.median(times[1:] or times or [math.nan])  # very short runs log no time


def peak_mib(log: Path, max_rss: int) -> float:
    """Peak memory in MiB, of the GPU if there is one, and else of the whole process."""
    on_gpu = re.findall(r"max_mem: (\d+)M", log.read_text())
    if on_gpu:
        return float(max(map(int, on_gpu)))
    return max_rss / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, not KiB
