"""The comparison of losses: statistics, search, repeated runs, and the table."""

import json
import math
import os
import re
import subprocess
import sys

import compare
import compare_report as report
import compare_runs
import pytest
from compare_methods import ABLATIONS, parse_method
from conftest import ROOT
from detectron2.modeling import build_model
from ssimkd import ConfigError
from ssimkd.engine.arguments import load_config


def row(method, seed, ap, budget=500):
    metrics = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2}
    return {"budget": budget, "method": method, "weight": 4.0, "seed": seed, **metrics}


def solo(method, turn, seconds, peak_mib):
    return {"method": method, "round": turn, "seconds": seconds, "peak_mib": peak_mib}


# --- statistics ---


def test_paired_difference_by_hand():
    ours, others = {1: 5.0, 2: 7.0, 3: 9.0, 4: 1.0}, {3: 4.0, 2: 4.0, 1: 4.0, 5: 0.0}
    found = report.paired(ours, others)
    # of 1, 3 and 5: deviation 2, so an error of 2 / sqrt(3); t for 2 degrees of freedom is 4.303
    assert found.mean == 3.0 and found.error == pytest.approx(1.1547, abs=1e-4)
    assert (found.low, found.high) == pytest.approx((3 - 4.9683, 3 + 4.9683), abs=1e-3)
    assert report.paired(ours, {1: 4.0}) is None


def test_costs_are_medians_and_ratios_to_the_plain_student():
    rows = [solo("vanilla", turn, s, 800.0) for turn, s in enumerate([0.1, 0.2, 9.0])]
    rows += [solo("ssim", turn, s, 1000.0) for turn, s in enumerate([0.2, 0.3, 0.4])]
    found = report.costs(rows)
    assert found["ssim"]["seconds"] == 0.3 and found["ssim"]["peak_mib_ratio"] == 1.25
    assert found["ssim"]["seconds_ratio"] == pytest.approx(1.5)
    assert found["vanilla"]["seconds_ratio"] == 1.0


# --- tables ---


RUNS = [
    *[row("ssim", seed, ap) for seed, ap in ((1, 30.0), (2, 34.0))],
    *[row("rival", seed, ap) for seed, ap in ((1, 40.0), (2, 44.1))],
    *[row("twin", seed, ap) for seed, ap in ((1, 29.0), (2, 36.0))],
    *[row("poor", seed, ap) for seed, ap in ((1, 10.0), (2, 14.1))],
    row("once", 1, 20.0),
]


def test_a_row_per_method_the_best_first():
    table = report.summarise(RUNS, [solo("rival", 1, 0.2, 900.0)])
    head, rule, *lines = report.markdown(table).splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {len(report.HEAD) + 1}
    # the deviation of 40 and 44.1 is 4.1 / sqrt(2); the differences are 10 and 10.1, their
    # deviation 0.1 / sqrt(2), its error 0.05, t for one degree of freedom 12.706
    assert lines[0] == (
        "| rival | 4 | 2 | 42.0 +- 2.9 | 84.1 +- 5.8 | 21.0 +- 1.4 | +10.1, 0.1 [+9.4, +10.7] "
        "| 0.200 | - | 900 | - |"
    )
    assert [line.split(" | ")[0] for line in lines] == [
        "| rival", "| twin", "| ssim", "| once", "| poor"
    ]  # fmt: skip
    assert lines[2].endswith("| 16.0 +- 1.4 | - | - | - | - | - |")  # no difference to itself
    assert lines[3].startswith("| once | 4 | 1 | 20.0 | 40.0 | 10.0 | - |")


def test_sizes_and_classes_have_a_table_of_their_own():
    found = [{"APs": None, "APl": 30.0, "AP-cell": 40.0}, {"APs": None}]  # the last found nothing
    runs = [{"method": "ssim", "parts": parts} for parts in found]
    head, _, line = report.by_size_and_class(runs, ["ssim"]).splitlines()
    assert head == "| method | APl | AP-cell |"
    assert line == "| ssim | 15.0 +- 21.2 | 20.0 +- 28.3 |"


# --- methods ---


@pytest.mark.parametrize(
    "on, fitting, others",
    [
        ("shapes", {"ssim", "kd", "dkd", "dist"}, {"bckd", "crosskd"}),
        ("retinanet", {"ssim", "kd", "dist", "bckd", "crosskd"}, {"dkd"}),
    ],
)
def test_every_loss_that_fits_the_student_is_compared(on, fitting, others):
    names = {m.name for m in compare.select(compare.parse_args(["--on", on]))}
    assert fitting < names and not others & names
    for name in others:
        with pytest.raises(ConfigError, match=f"method ssim\\+{name}: {name} compares a head that"):
            compare.select(compare.parse_args(["--on", on, "--methods", f"ssim+{name}"]))


@pytest.mark.parametrize("on", compare.EXPERIMENTS)
def test_every_student_can_be_built_with_every_loss_that_fits_it(on):
    methods = compare.select(compare.parse_args(["--on", on]))
    losses = tuple(method.loss for method in methods if method.loss and method.factor)
    cfg = load_config(compare.EXPERIMENTS[on].distilled, ["MODEL.DISTILL.LOSSES", str(losses)], ())
    assert set(build_model(cfg).distiller.losses) == set(losses)


def test_a_teacher_that_was_not_trained_is_named_before_any_run():
    opts = ["MODEL.DISTILL.TEACHER.WEIGHTS", "output/none.pth"]
    message = "no output/none.pth. Train this teacher first.* configs/shapes/retinanet_teacher.yaml"
    with pytest.raises(ConfigError, match=message):
        compare_runs.check_teacher("configs/shapes/retinanet_compare.yaml", opts)


def test_a_method_is_a_loss_with_changes():
    method = parse_method("ssim:SSIM.BORDER=zero:*0.5:WARMUP_ITERS=100")
    assert method.loss == "ssim" and method.factor == 0.5
    assert method.opts == (
        "MODEL.DISTILL.SSIM.BORDER", "zero", "MODEL.DISTILL.WARMUP_ITERS", "100"
    )  # fmt: skip
    assert method.searched_as == "ssim:SSIM.BORDER=zero:WARMUP_ITERS=100"


def test_a_wrong_method_is_named_and_every_ablation_is_a_method():
    for text, key in (
        ("nothing", "nothing"),
        ("ssim:SSIM.NO=1", "SSIM.NO"),
        ("l1:L1.WEIGHT=2", "FACTOR"),
    ):
        with pytest.raises(ConfigError, match=key):
            parse_method(text)
    methods = compare.select(compare.parse_args(["--ablation", *ABLATIONS]))
    assert {method.searched_as for method in methods[1:]} == {"ssim"}
    assert len({(method.opts, method.factor) for method in methods[1:]}) == len(methods) - 1


@pytest.mark.parametrize("path", (ROOT / "docs/comparison").glob("*.json"), ids=lambda p: p.stem)
def test_published_runs_are_of_todays_configs_and_keys(path):
    records = json.loads(path.read_text())
    for config, digest in {(r["settings"][0], r["config"]) for r in records.values()}:
        assert compare_runs.digest(config) == digest, config
    for config, *opts in {tuple(r["settings"]) for r in records.values()}:
        kept = [i for i in range(0, len(opts), 2) if opts[i].startswith("MODEL.DISTILL.")]
        load_config(config, [word for i in kept for word in opts[i : i + 2]], ())


# --- search and resumption, where no process is started ---


@pytest.fixture
def executed(monkeypatch):
    """Replaces the processes: `ap(run)` is a run's AP, an exception's text its failure."""
    calls = []

    def replace(ap, **more):
        def execute(run):
            calls.append(run)
            try:
                value = ap(run)
            except RuntimeError as error:
                return str(error)
            run.folder.mkdir(parents=True)
            record = {**run.settings(), "commit": "c", "machine": "m"}
            record.update(bbox={"AP": value, "AP50": value, "AP75": None}, seconds=1, peak_mib=1)
            record.update(more)
            (run.folder / compare_runs.RECORD).write_text(json.dumps(record))
            return ""

        monkeypatch.setattr(compare_runs, "execute", execute)
        return calls

    return replace


def comparison(tmp_path, *args):
    return compare.Comparison(
        compare.parse_args(["--out", str(tmp_path), "--budget", "8", "--jobs", "2", *args])
    )


def option(run, key):
    return run.opts[run.opts.index(key) + 1]


def weight_of(run):
    return float(option(run, "MODEL.DISTILL.L1.WEIGHT"))


@pytest.mark.parametrize(
    "target, tried, chosen",
    [
        (4.0, [1, 4, 16], 4.0),  # inside: the three are enough
        (16.0, [1, 4, 16, 64], 16.0),  # an edge: its neighbour
        (1e-6, [4.0**i for i in range(-5, 3)], 4.0**-5),  # at most eight
    ],
)
def test_search_moves_on_to_the_best_weight(tmp_path, executed, target, tried, chosen):
    calls = executed(lambda run: 50 - abs(math.log(weight_of(run) / target)))
    args, method = ("--search-seeds", "7", "8", "--search-budget", "4"), parse_method("l1:*2")
    search = comparison(tmp_path, *args)
    scores = search.search([parse_method(method.searched_as)], {"l1": 4.0})
    assert sorted(scores["l1"]) == tried and len(calls) == 2 * len(tried)
    assert compare.choose([method], scores) == {method: 2 * chosen}
    for run in calls:
        assert option(run, "DATASETS.TRAIN") == "('ssimkd_shapes_search_train',)"
        assert option(run, "DATASETS.TEST") == "('ssimkd_shapes_search_val',)"
        assert option(run, "SOLVER.MAX_ITER") == "4"


@pytest.mark.parametrize("ratio, centre", [(15.9, 4.0), (16.1, 1.0), (None, 4.0)])
def test_the_search_starts_where_the_gradients_are_in_proportion(tmp_path, executed, ratio, centre):
    calls = executed(lambda run: 0.0, gradient_ratio=ratio)
    assert comparison(tmp_path).probe([parse_method("l1")]) == {"l1": centre}
    assert weight_of(calls[0]) == 4.0 and option(calls[0], "MODEL.DISTILL.LOG_GRADIENTS") == "10"
    assert option(calls[0], "DATASETS.TRAIN") == "('ssimkd_shapes_search_train',)"


def test_a_pair_trains_with_the_partners_own_weight(tmp_path, executed):
    best = {"('l1',)": ("L1", 16.0), "('kd',)": ("KD", 1.0), "('l1', 'kd')": ("KD", 0.25)}

    def ap(run):
        loss, target = best[option(run, "MODEL.DISTILL.LOSSES")]
        return -abs(math.log(float(option(run, f"MODEL.DISTILL.{loss}.WEIGHT")) / target))

    calls = executed(ap, gradient_ratio=None)
    pair = parse_method("l1+kd")
    scores = comparison(tmp_path).search_all([pair])
    assert {name: compare.best(found) for name, found in scores.items()} == {
        "l1": 16.0, "kd": 1.0, "l1+kd": 0.25
    }  # fmt: skip
    pairs = [run for run in calls if option(run, "MODEL.DISTILL.LOSSES") == "('l1', 'kd')"]
    assert pairs and {weight_of(run) for run in pairs} == {16.0}


def test_a_weight_that_fails_is_not_chosen(tmp_path, executed):
    def ap(run):
        if weight_of(run) > 4:
            raise RuntimeError("loss is NaN")
        return weight_of(run)

    executed(ap)
    search = comparison(tmp_path)
    scores = search.search([parse_method("l1")], {"l1": 4.0})
    assert scores["l1"] == {4.0: 4.0, 1.0: 1.0, 16.0: -math.inf}
    text = compare.list_weights(scores)
    assert text.endswith("\n- l1: 1: 1.0, **4: 4.0**, 16: failed")


def test_photographs_are_searched_on_val_and_reported_on_test(tmp_path, executed):
    by_dataset = {
        name: {"AP": ap, "AP50": ap, "AP75": ap, "APs": ap}
        for name, ap in (("bccd_test", 1.0), ("bccd_val_test", 2.0))
    }
    calls = executed(lambda run: 2.0, by_dataset=by_dataset)
    photos = comparison(tmp_path, "--on", "photos", "--seeds", "1")
    photos.search([parse_method("l1")], {"l1": 4.0})
    assert {option(run, "DATASETS.TEST") for run in calls} == {"('bccd_val',)"}
    del calls[:]
    rows = photos.compare({parse_method("vanilla"): 0.0, parse_method("vanilla:*1.5"): 0.0})
    assert [option(run, "SOLVER.MAX_ITER") for run in calls] == ["8", "12"]
    assert {run.config for run in calls} == {"configs/photos/vanilla.yaml"}
    assert [(row["data"], row["AP"]) for row in rows] == [
        ("bccd_test", 1.0),
        ("bccd_val_test", 2.0),
    ] * 2
    text = compare.write_report(tmp_path, rows, [], "")
    assert "### 8 iterations, bccd_test\n" in text and "vanilla:*1.5 | 0 | 1 | 2.0" in text
    assert "| method | APs |" in text


def test_finished_runs_are_not_repeated_and_failed_ones_are(tmp_path, executed):
    broken = True

    def ap(run):
        if broken and option(run, "SEED") == "2":
            raise RuntimeError("out of luck")
        return 10.0

    calls = executed(ap)
    weights = {parse_method("vanilla"): 0.0, parse_method("l1"): 4.0}
    first = comparison(tmp_path, "--seeds", "1", "2", "3")
    rows = first.compare(weights)
    assert len(calls) == 6 and len(first.runner.failed) == 2
    assert {r["seed"] for r in rows} == {1, 3} and rows[0]["AP75"] == 0.0  # COCO's NaN
    broken = False
    again = comparison(tmp_path, "--seeds", "1", "2", "3")
    assert len(again.compare(weights)) == 6 and len(calls) == 8 and not again.runner.failed


def test_an_override_of_what_the_script_sets_is_refused(tmp_path):
    for key in ("SEED", "SOLVER.MAX_ITER", "MODEL.DISTILL.SSIM.WEIGHT"):
        with pytest.raises(ConfigError, match=f"{key} cannot be overridden"):
            comparison(tmp_path, "--", key, "7")


def test_runs_of_another_teacher_are_not_mixed(tmp_path, executed):
    executed(lambda run: 10.0, teacher="of another file")
    first = comparison(tmp_path, "--seeds", "1")
    with pytest.raises(ConfigError, match="holds a run with another teacher"):
        first.compare({parse_method("l1"): 4.0})


def test_timed_runs_of_other_settings_are_kept(tmp_path, executed):
    calls = executed(lambda run: 10.0)
    weights = {parse_method("vanilla"): 0.0}
    assert len(comparison(tmp_path, "--timing-rounds", "2").measure(weights)) == 2
    with pytest.raises(ConfigError, match="a run of other settings"):
        comparison(tmp_path, "--timing-rounds", "2", "--timing-iters", "9").measure(weights)
    assert len(comparison(tmp_path, "--timing-rounds", "2").measure(weights)) == len(calls) == 2


def test_published_runs_are_taken_over(tmp_path, executed):
    calls = executed(lambda run: 10.0)
    weights = {parse_method("vanilla"): 0.0, parse_method("l1"): 4.0}
    theirs = comparison(tmp_path / "theirs", "--seeds", "1", "2", "--timing-rounds", "1")
    rows = theirs.compare(weights)
    theirs.measure(weights)  # not taken over: the costs are of their machine
    compare_runs.gather(tmp_path / "theirs")
    compare_runs.restore(tmp_path / "theirs/records.json", tmp_path / "ours")
    again = comparison(tmp_path / "ours", "--seeds", "1", "2", "3").compare(weights)
    assert not (tmp_path / "ours" / compare_runs.TIMING).exists()
    assert len(calls) == 4 + 2 + 2 and [row for row in again if row["seed"] < 3] == rows
    (tmp_path / "wrong").write_text("[1]")
    for path in (tmp_path / "wrong", tmp_path / "absent"):
        with pytest.raises(ConfigError, match=f"--records: {path}"):
            compare_runs.restore(path, tmp_path)


def test_runs_of_another_config_file_are_not_taken_over(tmp_path, executed, monkeypatch):
    executed(lambda run: 10.0)
    weights = {parse_method("vanilla"): 0.0}
    comparison(tmp_path).compare(weights)
    monkeypatch.setattr(compare_runs, "digest", lambda config: "edited")
    with pytest.raises(ConfigError, match="or of another configs/shapes/vanilla.yaml"):
        comparison(tmp_path).compare(weights)
    compare_runs.gather(tmp_path)
    with pytest.raises(ConfigError, match="--records: .* of another configs/shapes/vanilla"):
        compare_runs.restore(tmp_path / "records.json", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_digest_is_of_values_in_a_config_and_its_bases(tmp_path):
    def digest_of(base, text="SEED: 2\n"):
        (tmp_path / "base.yaml").write_text(base)
        (tmp_path / "own.yaml").write_text(f"_BASE_: base.yaml\n{text}")
        return compare_runs.digest(str(tmp_path / "own.yaml"))

    first = digest_of("VERSION: 2\n")
    assert digest_of("# said\nVERSION:  2\n") == first != digest_of("VERSION: 1\n")
    assert digest_of("VERSION: 2\n", "SEED: 3\n") != first


def test_failures_end_with_status_1_after_the_report(tmp_path, executed, monkeypatch, capsys):
    def ap(run):
        if option(run, "SEED") == "2" and "vanilla" not in run.config:
            raise RuntimeError("out of luck")
        return 10.0

    executed(ap)
    args = ["--methods", "vanilla", "l1", "--seeds", "1", "2", "--budget", "8", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *args, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2 runs failed"):  # of the comparison and of the costs
        compare.main()
    said = capsys.readouterr()
    assert "| l1 | 4 | 1 |" in said.out and "| vanilla | 0 | 2 |" in said.out
    assert said.out.strip() == (tmp_path / "table.md").read_text().strip()
    assert re.search("failed: .*/8/l1-w4/seed2: out of luck", said.err)


# --- processes ---


def test_a_failed_process_leaves_its_last_line_and_no_record(tmp_path):
    run = compare_runs.Run(
        tmp_path / "run", compare.EXPERIMENTS["shapes"].vanilla, ("MODEL.WEIGHTS", "no.pth")
    )
    assert compare_runs.execute(run).startswith("exit status 1: error: MODEL.WEIGHTS: ")
    assert run.record() is None and os.listdir(tmp_path) == ["run"]
    assert "no.pth" in (run.folder / "output.txt").read_text()


def test_the_command_trains_compares_and_writes_its_files(tmp_path, few_shapes):
    shapes = compare.EXPERIMENTS["shapes"]
    command = [sys.executable, "benchmarks/compare.py", "--methods", "vanilla", "ssim"]
    command += ["--seeds", "1", "--budget", "3", "--search-seeds", "--timing-rounds", "1"]
    command += ["--timing-iters", "3", "--jobs", "2", "--out", str(tmp_path), "--"]
    command += ["SOLVER.IMS_PER_BATCH", "2", *shapes.search_train, *shapes.search_test]
    env = {**os.environ, "DETECTRON2_DATASETS": few_shapes}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in done.stdout and "### 3 iterations" in text
    assert text.count("| vanilla | 0 | 1 |") == text.count("| ssim | 4 | 1 |") == 1
    (vanilla,) = (line.split(" | ") for line in text.splitlines() if "vanilla | 0 " in line)
    assert float(vanilla[7]) > 0 and vanilla[8] == "1.00" and float(vanilla[9]) > 100
    assert (tmp_path / "plot.png").stat().st_size > 1000
