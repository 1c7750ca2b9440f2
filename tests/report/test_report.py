"""The report of a run: its numbers are those of the files, and it says what it leaves out."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, shapes_cfg
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from ssimkd.commands.report import main as command
from ssimkd.data.datasets import use_own_data
from ssimkd.data.shapes import FOLDER
from ssimkd.engine import yaml_driver as engine
from ssimkd.engine.arguments import load_config
from ssimkd.engine.run_record import end_of, record_run
from ssimkd.modeling.distiller import Captured
from ssimkd.report import images
from ssimkd.report.config_diff import differences
from ssimkd.report.detection_errors import KINDS, detection_errors
from ssimkd.report.detectors import Detector
from ssimkd.report.model_cost import flop_counter, speeds
from ssimkd.report.page import Report, gap
from ssimkd.report.run import Run

TEACHER = "configs/shapes/teacher.pth"  # a trained one
DASH = "\N{EN DASH}"  # for a number that is not known


class Page(HTMLParser):
    """Text, numbers by key, pictures and references of a page."""

    def __init__(self, text):
        super().__init__()
        self.html = text
        self.numbers, self.images, self.references, self.words = {}, [], [], []
        self._key = None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._key = attrs.get("data-n")
        if tag == "img":
            self.images.append(attrs["alt"])
        named = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.references += [attrs[name] for name in named if name in attrs]

    def handle_data(self, data):
        if self._key is not None:
            assert self._key not in self.numbers
            self.numbers[self._key] = data
            self._key = None
        self.words.append(data)


@pytest.fixture(scope="module")
def data(few_shapes):
    """Overrides for the few images as a user's own data: a run's config.yaml names them."""
    root = f"{few_shapes}/{FOLDER}"
    entries = [
        {"NAME": f"report_{s}", "JSON": f"{root}/instances_{s}.json", "IMAGES": f"{root}/{s}"}
        for s in ("train", "val")
    ]
    names = ("DATASETS.TRAIN", ("report_train",), "DATASETS.TEST", ("report_val",))
    yield ("DATASETS.COCO", entries, *names)
    for name in ("report_train", "report_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def do(action, name, out, *opts):
    """A run as train_net.py does it, in this process."""
    cfg = shapes_cfg(name, "OUTPUT_DIR", str(out), *opts)
    use_own_data(cfg, ("TRAIN", "TEST"))
    cfg.freeze()
    out.mkdir()
    (out / "config.yaml").write_text(cfg.dump())
    command = ["train_net.py", "--config-file", f"{name}.yaml"]
    command += ["--eval-only"] * (action is engine.evaluate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, *map(str, opts)])
        with record_run(str(out), list(cfg.DATASETS.TEST), action is engine.evaluate):
            action(cfg, False)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A student, its twin and their teacher's evaluation, each in a folder of its own."""
    root = tmp_path_factory.mktemp("report")
    short = (
        "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.BASE_LR", 0.001, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
        "TEST.DETECTIONS_PER_IMAGE", 20, "MODEL.DISTILL.CHECK_IMAGES", 0,
    )  # fmt: skip
    do(engine.train, "ssimkd", root / "student", *data, *short, "MODEL.DISTILL.ADAPTER", "conv1x1")
    do(engine.train, "vanilla", root / "twin", *data, *short)
    do(engine.evaluate, "teacher", root / "taught", *data, "MODEL.WEIGHTS", TEACHER)
    return root


@pytest.fixture(scope="module")
def report(folder):
    return Report([Run(str(folder / name)) for name in ("student", "twin", "taught")])


@pytest.fixture(scope="module")
def page(report):
    return Page(report.html())


def read(path):
    return json.loads(path.read_text())


def expected_numbers(folder, report, objects):
    """Every number of the page, from the files of the runs and from other code."""
    expected = {}
    image = report.own.read(report.names[0])["image"]
    names = {"student": "student", "twin": "twin", "teacher": "taught"}
    results = {k: read(folder / name / "results.json")["bbox"] for k, name in names.items()}
    for label, name in names.items():
        expected.update({f"{label}/{k}": (results[label][k], 1) for k in ("AP", "AP50", "AP75")})
        lines = (folder / name / "metrics.json").read_text() if label != "teacher" else ""
        times = [json.loads(line)["time"] for line in lines.splitlines() if '"time"' in line]
        expected[f"{label}/seconds"] = np.mean(times) if times else np.nan, 3
        expected[f"{label}/runs"] = 1, 0
        expected.update({f"{label}/bbox/{k}": (value, 1) for k, value in results[label].items()})
        weights = ROOT / TEACHER if label == "teacher" else folder / name / "student.pth"
        plain = build_model(shapes_cfg("teacher" if label == "teacher" else "vanilla")).eval()
        expected[f"{label}/parameters"] = sum(p.numel() for p in plain.parameters()) / 1e6, 2
        size = sum(x.numel() * x.element_size() for x in plain.state_dict().values())
        expected[f"{label}/size"] = size / 1e6, 2
        plain.load_state_dict(torch.load(weights, weights_only=True)["model"], strict=False)
        expected[f"{label}/flops"] = flop_counter(plain, image).total() / 1e9, 2
        found = detection_errors(
            objects, read(folder / name / "inference/coco_instances_results.json")
        )
        for kind in KINDS:
            expected[f"{label}/cost/{kind}"] = found.costs[kind], 1
            expected[f"{label}/count/{kind}"] = found.counts[kind], 0
    for key in results["student"]:
        s, v, t = (np.nan if r[key] is None else r[key] for r in results.values())
        expected[f"gain/bbox/{key}"] = s - v, 1
    s, v, t = (r["AP"] for r in results.values())
    assert t > v  # the teacher is trained
    shares = {"student": min(100 * (s - v) / (t - v), 100), "twin": np.nan, "teacher": np.nan}
    return {**expected, **{f"{label}/share": (share, 0) for label, share in shares.items()}}


def test_every_number_is_the_files(folder, report, page, few_shapes):
    with open(f"{few_shapes}/{FOLDER}/instances_val.json") as f:
        expected = expected_numbers(folder, report, json.load(f)["annotations"])
    found = dict(page.numbers)
    for label in ("student", "twin", "teacher"):
        assert float(found.pop(f"{label}/speed")) > 0
    levels = {k: found.pop(k) for k in list(found) if re.match(r"p\d/", k)}
    assert found.keys() == expected.keys()
    for key, (value, digits) in expected.items():
        if value is None or np.isnan(value):
            assert found[key] == DASH, key
        else:
            assert float(found[key]) == pytest.approx(value, abs=0.51 * 10**-digits), key
    check_levels(report, levels)


def check_levels(report, levels):
    """SSIM by level against the loss that training logs, image by image."""
    model, values = report.own.model, {level: [] for level in ("p2", "p3", "p4", "p5")}
    for name in report.names:
        x = report.own.read(name)
        images = model.preprocess_image([x])
        with torch.no_grad(), EventStorage() as storage:
            maps = model.backbone(images.tensor)
            model.distiller(Captured([x], maps, images.tensor, model.preprocessing))
            for level in values:
                values[level].append(1 - 2 * storage.latest()[f"ssim_kd/{level}"][0])
    assert {key.split("/")[0] for key in levels} == set(values)
    for level, found in values.items():
        assert float(levels[f"{level}/ssim"]) == pytest.approx(np.mean(found), abs=0.01)
        assert float(levels[f"{level}/least"]) == pytest.approx(min(found), abs=0.01)


def test_pictures_show_truth_and_every_detector(page, report):
    seen = {alt.split(": ")[1] for alt in page.images}
    assert seen == {"truth", "student", "twin", "teacher", "maps"}
    order = [alt.split(": ")[1] for alt in page.images[:5]]
    assert order == ["truth", "twin", "student", "teacher", "maps"]
    assert len(page.images) == 6 * 5
    means = np.mean([report.levels[level] for level in report.levels], axis=0)
    assert len(report.chosen()) == 6 and int(means.argmin()) in report.chosen()


def test_the_truth_is_what_is_annotated_without_crowds():
    thing = {"bbox": [2, 2, 6, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    record = {"height": 10, "width": 12, "annotations": [thing, {**thing, "iscrowd": 1}]}
    found = images.truth(record)
    assert found.gt_boxes.tensor.tolist() == [[2, 2, 8, 8]] and found.gt_classes.tolist() == [3]
    assert len(images.truth({**record, "annotations": []})) == 0


def test_hits_misses_and_false_alarms_by_hand():
    """The second detection is a duplicate, the third has the wrong class, the last is nowhere."""
    size = (50, 50)
    objects = Instances(size, gt_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])))
    objects.gt_classes = torch.tensor([0, 1])
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 40, 40], [30, 0, 40, 5]])
    found = Instances(size, pred_boxes=Boxes(boxes), pred_classes=torch.tensor([0, 0, 0, 1]))
    found.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert images.hits_and_misses(objects, found) == ([True, False, False, False], [False, True])
    assert images.hits_and_misses(objects[:0], found)[0] == [False] * 4
    assert images.hits_and_misses(objects, found[:0])[1] == [True] * 2


def test_runs_that_differ_only_in_their_seed_are_one_row(folder, tmp_path):
    runs = [Run(str(folder / "student"))]
    for seed, ap in ((2, 3.0), (3, 5.0)):
        (tmp_path / str(seed)).mkdir()
        runs.append(
            copy_run(folder, tmp_path / str(seed), "student", config=("SEED: 1", f"SEED: {seed}"))
        )
        runs[-1].results = {"bbox": {"AP": ap}}
    other = copy_run(folder, tmp_path, "student", config=("MAX_ITER: 2", "MAX_ITER: 3"))
    report = Report([*runs, other])
    assert [len(d.runs) for d in report.detectors] == [3, 1, 0]
    values = [runs[0].results["bbox"]["AP"], 3.0, 5.0]
    expected = f"{np.mean(values):.1f} \N{PLUS-MINUS SIGN} {np.std(values, ddof=1):.1f}"
    assert Page(report.html()).numbers[f"{report.own.label}/AP"] == expected


@pytest.mark.parametrize(
    ("values", "share"),
    [((50, 40, 60), 50), ((70, 40, 60), 100), ((30, 40, 60), -50), ((50, 40, 30), None)],
)
def test_the_share_of_the_gap(values, share):
    assert gap(*values) == share
    assert gap(None, *values[1:]) is None and gap(values[0], None, values[2]) is None


def test_one_architecture_is_timed_once(report, monkeypatch):
    timed = []
    monkeypatch.setattr(Detector, "detect", lambda self, name: timed.append(self.label))
    found = speeds(report.detectors, report.names[:1])
    assert set(timed) == {"student", "teacher"}
    assert found["twin"] == found["student"] and len(found) == 3


def test_detectors_that_differ_in_an_evaluation_are_timed_one_by_one(folder, tmp_path, monkeypatch):
    smaller = copy_run(
        folder, tmp_path, "twin", config=("DETECTIONS_PER_IMAGE: 20", "DETECTIONS_PER_IMAGE: 9")
    )
    report, timed = Report([Run(str(folder / "twin")), smaller]), set()
    monkeypatch.setattr(Detector, "detect", lambda self, name: timed.add(self.label))
    assert set(speeds(report.detectors, report.names[:1])) == timed and len(timed) == 2
    assert len({d.architecture for d in report.detectors}) == 1


@pytest.mark.parametrize("change", [("MAX_ITER: 2", "MAX_ITER: 3"), ("- report_train", "- other")])
def test_a_twin_was_trained_alike(folder, tmp_path, change):
    student = Run(str(folder / "student"))
    assert Report([student, copy_run(folder, tmp_path, "twin", config=change)]).twin is None


def test_a_run_on_other_data_of_the_same_name_is_not_compared(folder, tmp_path):
    other = copy_run(
        folder, tmp_path, "twin", config=("instances_val.json", "instances_train.json")
    )
    report = Report([Run(str(folder / "student")), other])
    assert report.twin is None and other.images == [] and len(report.comparable) == 1
    assert "was evaluated on other data called report_val" in Page(report.html()).text


def test_an_evaluation_alone_is_no_twin(folder, tmp_path):
    again = copy_run(folder, tmp_path, "twin", missing=["metrics.json"])
    again.record = [{**again.record[-1], "evaluates": True}]
    assert Report([Run(str(folder / "student")), again]).twin is None


def test_a_run_that_detected_nothing_counts_as_0(report):
    found = [SimpleNamespace(results={"bbox": {"AP": x, "APl": x}}) for x in (10.0, None)]
    assert Detector("two", found).values("bbox", "AP") == [10.0, 0.0]
    assert Detector("two", found).values("bbox", "APl") == [10.0]


def test_an_image_that_cannot_be_read_is_left_out(folder):
    run = Run(str(folder / "twin"))
    gone = {**run.images[0], "file_name": "gone.png"}
    run.images = [gone, *run.images]
    report = Report([run])
    assert "gone.png" not in report.names and report.names
    assert "An image is left out: " in Page(report.html()).text


def test_without_a_twin_there_is_no_share_of_the_gap(folder):
    page = Page(Report([Run(str(folder / name)) for name in ("student", "taught")]).html())
    assert page.numbers["student/share"] == DASH and "needs a run of the same student" in page.text


def copy_run(folder, tmp_path, name, *, missing=(), broken=(), config=("", "")):
    """A copy of a run: some files are missing or cut off, a text in its config is replaced."""
    out = tmp_path / name
    shutil.copytree(folder / name, out)
    for path in (path for file in missing for path in out.glob(file)):
        path.unlink()
    for file in broken:
        text = (out / file).read_text()
        (out / file).write_text(text[: len(text) // 2])
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(*config))
    return Run(str(out))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"missing": ["*.pth"]}, "measurements of student are left out"),
        ({"missing": ["metrics.json"]}, "There are no curves"),
        ({"config": (TEACHER, "gone.pth")}, "The teacher could not be loaded"),
    ],
)
def test_without_a_file_the_page_says_so_and_keeps_the_results(folder, tmp_path, change, said):
    page = Page(Report([copy_run(folder, tmp_path, "student", **change)]).html())
    assert said in page.text and "This run has no teacher" not in page.text
    expected = read(folder / "student/results.json")["bbox"]["AP50"]
    assert float(page.numbers["student/AP50"]) == pytest.approx(expected, abs=0.06)


def test_without_its_data_a_run_has_no_pictures(folder, monkeypatch):
    def gone(name):
        raise FileNotFoundError(f"{name} is gone")

    monkeypatch.setattr("ssimkd.report.run.DatasetCatalog.get", gone)
    page = Page(Report([Run(str(folder / "twin"))]).html())
    assert "report_val cannot be read" in page.text and "There are no pictures" in page.text
    assert page.numbers["twin/speed"] == DASH and page.numbers["twin/AP"] != DASH


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_missing_and_broken_files_leave_their_sections_out(folder, tmp_path, how):
    files = ["results.json", "run.json", "inference/coco_instances_results.json"]
    page = Page(Report([copy_run(folder, tmp_path, "twin", **{how: files})]).html())
    for words in (
        "This run has no teacher", "This run was not evaluated", "There are no results",
        "Command, commit and versions are not known", "The errors are not counted",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.text.count("is not valid JSON") == (2 if how == "broken" else 0)
    assert page.numbers["twin/AP"] == DASH and float(page.numbers["twin/parameters"]) > 0


def test_without_its_adapters_a_students_maps_are_not_compared(folder, tmp_path):
    report = Report([copy_run(folder, tmp_path, "student", missing=["last_checkpoint"])])
    assert report.own.model is not None and not report.levels
    assert any("student.pth lacks the adapters" in note for note in report.notes)


def test_it_says_what_was_trained_and_how_to_do_it_again(page, folder):
    entry = read(folder / "student/run.json")[0]
    for words in (
        TEACHER, "ssim (weight 16)", "adapter conv1x1",
        entry["command"], f"Commit {entry['commit']}", f"torch {torch.__version__.split('+')[0]}",
        end_of(entry), "2 iterations of 2 images", "MODEL.DISTILL.ADAPTER 'conv1x1'",
    ):  # fmt: skip
        assert words in page.text, words


def test_it_needs_nothing_beside_it(page):
    outside = [r for r in page.references if not r.startswith(("data:", "#"))]
    assert not outside and "<script" not in page.html and "@import" not in page.html
    assert not re.search(r"url\((?!#)", page.html)


def test_the_command(folder, tmp_path, capsys):
    command([str(folder / "twin"), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.endswith(f"Report: {tmp_path / 'page.html'}\n")
    assert "<title>twin - run report</title>" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit, match=f"^error: {folder} holds no config.yaml"):
        command([str(folder)])
    with pytest.raises(SystemExit, match="^error: --out: there is no folder .*/none$"):
        command([str(folder / "twin"), "--out", str(tmp_path / "none/a.html")])


def test_a_later_evaluation_does_not_change_the_end(folder, tmp_path):
    run = copy_run(folder, tmp_path, "student")
    entries = read(folder / "student/run.json")
    later = {"command": "eval x", "evaluates": True, "ended": "2099-01-01T00:00:00+00:00"}
    run.record = [*entries, {**entries[0], **later}]
    assert run.ended == end_of(entries[0]) and run.results
    assert run.notes == [f"AP and errors of {run.folder} are those that eval x found."]
    assert Run(str(folder / "taught")).trained == "nothing: the run was only evaluated"


def test_ap_of_other_data_is_named_and_not_compared(folder, tmp_path):
    other = copy_run(folder, tmp_path, "twin", config=("- report_val", "- report_train"))
    report = Report([Run(str(folder / "student")), other])
    assert list(report.tasks()["bbox"]["AP"][0]) == list(report.errors()) == ["student"]
    assert any("twin was evaluated on report_train" in note for note in report.notes)


def test_a_teacher_of_other_classes_has_no_pictures(folder):
    report = Report([Run(str(folder / "student"))])
    teacher = next(d for d in report.detectors if d.teaches)
    assert "teacher" in report.images()[0]["pictures"]
    teacher.classes = ["person", "car"]  # of a config; the head has four classes
    assert "teacher" in report.images()[0]["pictures"]
    teacher.classes = ["person", "car", "dog", "cat"]
    assert "teacher" not in report.images()[0]["pictures"]
    assert report.notes[-1].startswith("Pictures of teacher are left out: its classes are not")


def test_a_detector_that_cannot_run_here_is_left_out(folder, monkeypatch):
    def fail(detector, name):
        if detector.teaches:
            raise ImportError("no _C")
        return detect(detector, name)

    detect = Detector.detect
    monkeypatch.setattr(Detector, "detect", fail)
    report = Report([Run(str(folder / "student"))])
    assert "teacher" not in report.images()[0]["pictures"]
    assert any("an operator that Detectron2 compiles is missing" in note for note in report.notes)


def test_settings_that_differ_are_listed(folder):
    rows = differences([Run(str(folder / name)) for name in ("student", "twin")])
    found = {key: values for key, *values in rows}
    assert found["MODEL.DISTILL.ADAPTER"] == ["'conv1x1'", "'none'"]
    assert all(len(set(values)) == 2 for values in found.values())
    assert not any(key.startswith("MODEL.DISTILL.ICD.") for key in found)
    assert "SOLVER.MAX_ITER" not in found


def test_a_lazy_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr("ssimkd.report.page.SAMPLE", 1)
    entries = [f"{{name: {e['NAME']}, json: {e['JSON']}, images: {e['IMAGES']}}}" for e in data[1]]
    overrides = [
        "model.distiller.teacher.config=configs/shapes/teacher.yaml",
        f"model.distiller.teacher.weights={TEACHER}", "model.distiller.adapter=conv1x1",
        "model.roi_heads.num_classes=4", "train.device=cpu",
        "dataloader.test.mapper.augmentations.0.short_edge_length=32",
        "dataloader.train.dataset.names=report_train", "dataloader.test.dataset.names=report_val",
        f"+datasets.coco=[{','.join(entries)}]",
    ]  # fmt: skip
    cfg = load_config("configs/ssimkd_R50.py", overrides)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "student.pth")
    (tmp_path / "results.json").write_text('{"report_val": {"bbox": {"AP": 12.34}}}')
    page = Page(Report([Run(str(tmp_path))]).html())
    assert "ssim (weight 4)" in page.text and page.numbers[f"{tmp_path.name}/AP"] == "12.3"
    assert float(page.numbers["teacher/parameters"]) > 1 and "p6/ssim" in page.numbers
