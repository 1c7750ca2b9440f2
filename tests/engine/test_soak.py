"""In a long run, a process's memory, files, threads and hooks do not grow."""

import json
import os
from statistics import median

import pytest
from runs import finish, lazy_words, same, saved, yaml_words

ITERATIONS, EVAL_PERIOD = 1500, 250
SIZES = dict(max_iter=ITERATIONS, checkpoint_period=500)


class Watch:
    """Writes every 25 iterations how much memory, files, threads and hooks there are."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        from ssimkd.engine.hooks import ExactResume

        after_step = ExactResume.after_step

        def watched(hook):
            after_step(hook)
            if (hook.trainer.iter + 1) % 25 == 0:
                with open(self.path, "a") as f:
                    f.write(json.dumps(held(hook.model)) + "\n")

        ExactResume.after_step = watched


def held(model):
    pages = int(open("/proc/self/statm").read().split()[1])
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "processes": len(children),
        "threads": len(os.listdir("/proc/self/task")),
        "hooks": sum(
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            for module in model.modules()
        ),
    }


@pytest.mark.soak
@pytest.mark.parametrize(
    "words, rate",
    [(yaml_words, ("SOLVER.BASE_LR", 0.005)), (lazy_words, ("optimizer.lr=1e-4",))],
    ids=["yaml", "lazy"],
)
def test_a_long_run_does_not_grow_and_its_evaluations_do_not_change_it(
    words, rate, few_shapes, tmp_path, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    runs = {
        "with": dict(SIZES, eval_period=EVAL_PERIOD, workers=2),
        "without": dict(SIZES, eval_period=0, workers=0),
    }
    for name, sizes in runs.items():
        out = tmp_path / name
        out.mkdir()
        watch = Watch(out / "held.json")
        status = finish(words(out, *rate, **sizes), out / "out.txt", watch, seconds=3600)
        assert status == 0, (out / "out.txt").read_text()[-3000:]
        lines = [json.loads(line) for line in open(out / "held.json")]
        quarter = len(lines) // 4
        warm, late = lines[quarter : 2 * quarter], lines[-quarter:]
        memory = [median(line.pop("memory") for line in part) for part in (warm, late)]
        assert memory[1] < 1.02 * memory[0]  # Detectron2 itself keeps each logged number
        assert all(line == warm[0] for line in [*warm, *late])
    whole = tmp_path / "without" / "model_final.pth"
    assert same(tmp_path / "with" / "model_final.pth", saved(whole))
