"""The report of a run: its numbers are the files', and a browser shows it whole on any screen."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, shapes_cfg
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode, Instances
from detectron2.utils.events import EventStorage
from ssimkd.commands.report import main as command
from ssimkd.data.datasets import use_own_data
from ssimkd.data.shapes import FOLDER
from ssimkd.engine import lazy_driver as lazy_engine
from ssimkd.engine import yaml_driver as engine
from ssimkd.engine.arguments import load_config
from ssimkd.engine.run_record import in_words, record_run
from ssimkd.report import images
from ssimkd.report.config_diff import differences
from ssimkd.report.detection_errors import KINDS, detection_errors
from ssimkd.report.model_cost import flop_counter
from ssimkd.report.page import Report
from ssimkd.report.run import Run

TEACHER = "configs/shapes/teacher.pth"  # a trained one
DASH = "\N{EN DASH}"  # for a number that is not known


class Page(HTMLParser):
    """Text, numbers by key, pictures and references of a page."""

    def __init__(self, text):
        super().__init__()
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
        with record_run(str(out)):
            action(cfg, False)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A student, its twin and their teacher's evaluation, each in a folder of its own."""
    root = tmp_path_factory.mktemp("report")
    short = (
        "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.BASE_LR", 0.001, "TEST.EVAL_PERIOD", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
        "TEST.DETECTIONS_PER_IMAGE", 20, "MODEL.DISTILL.CHECK_IMAGES", 0,
    )  # fmt: skip
    do(engine.train, "ssimkd", root / "student", *data, *short, "MODEL.DISTILL.ADAPTER", "conv1x1")
    do(engine.train, "vanilla", root / "twin", *data, *short)
    do(engine.evaluate, "teacher", root / "taught", *data, "MODEL.WEIGHTS", TEACHER)
    return root


@pytest.fixture(scope="module")
def report(folder):
    return Report(Run(str(folder / "student")), [Run(str(folder / n)) for n in ("twin", "taught")])


@pytest.fixture(scope="module")
def text(report):
    return report.html()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


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
        expected.update({f"{label}/bbox/{k}": (value, 1) for k, value in results[label].items()})
        weights = ROOT / TEACHER if label == "teacher" else folder / name / "student.pth"
        plain = build_model(shapes_cfg("teacher" if label == "teacher" else "vanilla")).eval()
        expected[f"{label}/parameters"] = sum(p.numel() for p in plain.parameters()) / 1e6, 2
        expected[f"{label}/size"] = os.path.getsize(weights) / 1e6, 2
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
        expected[f"share/bbox/{key}"] = (100 * (s - v) / (t - v) if t > v else np.nan), 0
    return expected


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
            model.distiller([x], maps, images.tensor, model.preprocessing)
            for level in values:
                values[level].append(1 - 2 * storage.latest()[f"ssim_kd/{level}"][0])
    assert {key.split("/")[0] for key in levels} == set(values)
    for level, found in values.items():
        assert float(levels[f"{level}/ssim"]) == pytest.approx(np.mean(found), abs=0.01)
        assert float(levels[f"{level}/least"]) == pytest.approx(min(found), abs=0.01)


def test_pictures_show_truth_and_every_detector(page, report):
    seen = {alt.split(": ")[1] for alt in page.images}
    assert seen == {"ground truth", "student", "twin", "teacher", "where maps differ", "maps"}
    assert len(page.images) == 6 * 5 + 2
    means = np.mean([report.levels[level] for level in report.levels], axis=0)
    assert len(report.chosen()) == 6 and int(means.argmin()) in report.chosen()


def test_the_truth_is_drawn_as_annotated_without_crowds():
    square = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]
    thing = {"bbox": [2, 2, 6, 6], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    objects = [{**thing, "segmentation": square, "keypoints": [0] * 9}, {**thing, "iscrowd": 1}]
    record = {"height": 10, "width": 12, "annotations": objects}
    found = images.truth(record, masks=True)
    assert found.pred_boxes.tensor.tolist() == [[2, 2, 8, 8]] and found.pred_classes.tolist() == [3]
    assert found.pred_masks.shape == (1, 10, 12) and 25 <= found.pred_masks.sum() <= 49
    assert not images.truth(record, masks=False).has("pred_masks")
    assert len(images.truth({**record, "annotations": []}, masks=True)) == 0


def test_a_picture_shows_the_detections_above_the_least_score(report, monkeypatch):
    shown = []
    monkeypatch.setattr(images, "draw_detections", lambda name, found, *rest: shown.append(found))
    teacher, record = report.detectors[-1], report.sample[0]
    images.draw_image(record, [teacher], None)
    found = teacher.detect(record["file_name"])
    assert isinstance(shown[1], Instances) and (found.scores < images.LEAST_SCORE).any()
    assert torch.equal(shown[1].scores, found.scores[found.scores >= images.LEAST_SCORE])


def test_maps_differ_by_the_mean_of_the_levels():
    maps = {"p2": {"SSIM": np.array([[1.0, np.nan]])}, "p3": {"SSIM": np.array([[0.0, 0.5]])}}
    assert images.difference(maps).tolist() == [[0.5, 0.5]]
    assert images.level_means(maps) == {"p2": 1.0, "p3": 0.25}


def broken_run(folder, tmp_path, name, *, missing=(), broken=()):
    """A copy of a run without some files, and with others cut off; its page."""
    out = tmp_path / name
    shutil.copytree(folder / name, out)
    for file in missing:
        for path in out.glob(file):
            path.unlink()
    for file in broken:
        text = (out / file).read_text()
        (out / file).write_text(text[: len(text) // 2])
    return Page(Report(Run(str(out)), []).html())


def test_a_run_without_checkpoint_keeps_its_results(folder, tmp_path):
    page = broken_run(folder, tmp_path, "student", missing=["*.pth"])
    assert "measurements of student are left out" in page.text and not page.images
    assert "This run has no teacher" not in page.text
    expected = read(folder / "student/results.json")["bbox"]["AP50"]
    assert float(page.numbers["student/AP50"]) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_missing_and_broken_files_leave_their_sections_out(folder, tmp_path, how):
    files = ["results.json", "run.json", "inference/coco_instances_results.json"]
    page = broken_run(folder, tmp_path, "twin", **{how: files})
    for words in (
        "This run has no teacher", "This run was not evaluated", "There are no results",
        "Command, commit and versions are not known", "They are not counted",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.text.count("is not valid JSON") == (2 if how == "broken" else 0)
    assert page.numbers["twin/AP"] == DASH and float(page.numbers["twin/parameters"]) > 0


def test_without_metrics_there_are_no_curves(folder, tmp_path):
    page = broken_run(folder, tmp_path, "twin", missing=["metrics.json"])
    assert "There are no curves" in page.text and "twin/AP" in page.numbers


def test_without_its_data_a_run_has_no_pictures(folder, monkeypatch):
    def gone(name):
        raise FileNotFoundError(f"{name} is gone")

    monkeypatch.setattr("ssimkd.report.run.DatasetCatalog.get", gone)
    page = Page(Report(Run(str(folder / "twin")), []).html())
    assert "report_val cannot be read" in page.text and "There are no pictures" in page.text
    assert page.numbers["twin/speed"] == DASH and page.numbers["twin/AP"] != DASH


def test_without_its_adapters_a_students_maps_are_not_compared(folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "student")
    (tmp_path / "student/last_checkpoint").unlink()
    config = yaml.safe_load((folder / "student/config.yaml").read_text())
    config["MODEL"]["WEIGHTS"] = str(folder / "student/student.pth")
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated/config.yaml").write_text(yaml.safe_dump(config))
    for name in ("student", "evaluated"):
        report = Report(Run(str(tmp_path / name)), [])
        assert report.own.model is not None and not report.levels
        assert any("student.pth lacks the adapters" in note for note in report.notes)


def test_it_says_what_was_trained_and_how_to_do_it_again(page, folder):
    entry = read(folder / "student/run.json")[0]
    for words in (
        "DistillRCNN, FPN, ResNet", TEACHER, "ssim (weight 16)", "adapter conv1x1",
        entry["command"], f"Commit {entry['commit']}", f"torch {torch.__version__.split('+')[0]}",
        in_words(entry["ended"]), "4 iterations of 2 images", "MODEL.DISTILL.ADAPTER 'conv1x1'",
    ):  # fmt: skip
        assert words in page.text, words


def test_it_needs_nothing_beside_it(page, text):
    outside = [r for r in page.references if not r.startswith(("data:", "#"))]
    assert not outside and "<script" not in text and "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_a_run_whose_teacher_is_gone_keeps_the_rest(folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "student")
    config = tmp_path / "student/config.yaml"
    config.write_text(config.read_text().replace(TEACHER, "gone.pth"))
    page = Page(Report(Run(str(tmp_path / "student")), []).html())
    assert "The teacher could not be loaded" in page.text and "gone.pth" in page.text
    assert float(page.numbers["student/AP"]) == pytest.approx(
        read(folder / "student/results.json")["bbox"]["AP"], abs=0.06
    )


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    words = ["report.py", "--run", str(folder / "twin"), "--out", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", words)
    command()
    assert capsys.readouterr().out.endswith(f"Report: {tmp_path / 'page.html'}\n")
    assert "<title>twin - run report</title>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--run", "{}"), "{}: there is no config.yaml: is it the folder of a run?"),
        (("--run", "{}/no"), "{}/no: there is no config.yaml: is it the folder of a run?"),
        (("--run", "{}/twin", "--out", "{}/none/a.html"), "--out: there is no folder {}/none"),
    ],
)
def test_what_it_refuses(folder, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["report.py", *(word.format(folder) for word in words)])
    with pytest.raises(SystemExit, match=re.escape(f"error: {message.format(folder)}")):
        command()


def test_a_later_evaluation_does_not_change_the_end(folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "student")
    entries = read(folder / "student/run.json")
    later = {"command": "python train_net.py --eval-only", "ended": "2099-01-01T00:00:00+00:00"}
    (tmp_path / "student/run.json").write_text(json.dumps([*entries, {**entries[0], **later}]))
    run = Run(str(tmp_path / "student"))
    assert run.ended == in_words(entries[0]["ended"]) and "minutes" in run.trained
    assert Run(str(folder / "taught")).trained == "nothing: the run was only evaluated"


def test_ap_of_other_data_is_named_and_not_compared(folder, tmp_path, data):
    shutil.copytree(folder / "twin", tmp_path / "twin")
    config = tmp_path / "twin/config.yaml"
    config.write_text(config.read_text().replace("- report_val", "- report_train"))
    report = Report(Run(str(folder / "student")), [Run(str(tmp_path / "twin"))])
    assert report.tasks()["bbox"]["labels"] == list(report.errors()) == ["student"]
    assert any("twin was evaluated on report_train" in note for note in report.notes)


def test_settings_that_differ_are_listed(folder):
    rows = differences([Run(str(folder / name)) for name in ("student", "twin")])
    found = {key: values for key, *values in rows}
    assert found["MODEL.DISTILL.ADAPTER"] == ["'conv1x1'", "'none'"]
    assert all(len(set(values)) == 2 for values in found.values())
    assert not any(key.startswith("MODEL.DISTILL.ICD.") for key in found)
    assert "SOLVER.MAX_ITER" not in found


def test_a_lazy_run(data, few_shapes, tmp_path, monkeypatch):
    out = tmp_path / "lazy"
    out.mkdir()
    entries = [f"{{name: {e['NAME']}, json: {e['JSON']}, images: {e['IMAGES']}}}" for e in data[1]]
    overrides = [
        "model.distiller.teacher.config=configs/shapes/teacher.yaml",
        f"model.distiller.teacher.weights={TEACHER}", "model.distiller.adapter=conv1x1",
        "+train.check_images=0", "model.roi_heads.num_classes=4", "optimizer.lr=1e-6",
        "train.init_checkpoint=", "dataloader.train.dataset.names=report_train",
        "dataloader.test.dataset.names=report_val", "dataloader.train.total_batch_size=2",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[32]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=32",
        "dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "train.max_iter=1",
        "train.device=cpu", f"train.output_dir={out}",
        f"+datasets.coco=[{','.join(entries)}]",
    ]  # fmt: skip
    config = "configs/ssimkd_R50.py"
    cfg = load_config(config, overrides)
    LazyConfig.save(cfg, str(out / "config.yaml"))
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", config, *overrides])
    with record_run(str(out)):
        lazy_engine.train(cfg, False)
    page = Page(Report(Run(str(out)), []).html())
    assert "DistillRCNN" in page.text and "adapter conv1x1" in page.text
    assert page.numbers["lazy/AP"] == f"{read(out / 'results.json')['bbox']['AP']:.1f}"
    assert float(page.numbers["teacher/parameters"]) > 1 and "p6/ssim" in page.numbers


# A real browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
LOOK = """<!DOCTYPE html><html><body style="margin:0"><script>
function look() {
  const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
  const images = [...inner.images], texts = [...inner.querySelectorAll("svg text")];
  document.title = JSON.stringify({
    wide: root.scrollWidth, view: root.clientWidth, images: images.length,
    broken: images.filter(i => !(i.complete && i.naturalWidth)).map(i => i.alt),
    small: Math.min(...texts.map(e => e.getBoundingClientRect().height)),
    ground: getComputedStyle(inner.body).backgroundColor, ink: getComputedStyle(inner.body).color,
  });
}
</script><iframe style="border:0;color-scheme:SCHEME" width="WIDTH" height="900" onload="look()"
srcdoc="PAGE"></iframe></body></html>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page in")
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_a_browser_shows_all_of_it(text, page, tmp_path, width, scheme):
    wrapper = LOOK.replace("SCHEME", scheme).replace("WIDTH", str(width))
    (tmp_path / "look.html").write_text(wrapper.replace("PAGE", html.escape(text)))
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars dump-dom window-size=1300,900"
    )
    command = [CHROMIUM, *(f"--{flag}" for flag in flags.split())]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "look.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(html.unescape(title.group(1)))
    assert seen["view"] == width and seen["wide"] <= width, seen
    assert seen["images"] == len(page.images) and not seen["broken"]
    assert seen["small"] >= 9  # pixels: readable
    ground, ink = (
        np.mean([int(n) for n in re.findall(r"\d+", seen[k])[:3]]) for k in ("ground", "ink")
    )
    assert (ground < 60 and ink > 200) if scheme == "dark" else (ground > 200 and ink < 60)
