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
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from ssimkd import ConfigError
from ssimkd.checkpoint.graph import OneImage
from ssimkd.checkpoint.same_run import flatten
from ssimkd.commands.report import main as command
from ssimkd.data.datasets import use_own_data
from ssimkd.data.shapes import FOLDER
from ssimkd.engine import lazy_driver as lazy_engine
from ssimkd.engine import yaml_driver as engine
from ssimkd.engine.arguments import load_config
from ssimkd.engine.run_record import in_words, read_record, record_run
from ssimkd.report import images as pictures
from ssimkd.report.config_diff import differences, flat
from ssimkd.report.detection_errors import KINDS, detection_errors
from ssimkd.report.page import Report, adapters_in
from ssimkd.report.run import Run

TEACHER = "configs/shapes/teacher.pth"  # a trained one
BOOKKEEPING = ("iteration", "eta_seconds", "images_per_second")  # not of the table
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
    do(engine.evaluate, "teacher", root / "teacher", *data, "MODEL.WEIGHTS", TEACHER)
    return root


@pytest.fixture(scope="module")
def report(folder):
    return Report(Run(str(folder / "student")), [Run(str(folder / n)) for n in ("twin", "teacher")])


@pytest.fixture(scope="module")
def text(report):
    return report.html()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def read(path):
    return json.loads(path.read_text())


def expected_numbers(folder, report):
    """Every number of the page, from the files of the runs and from other code."""
    expected = {}
    objects = read(folder.parent / "objects.json")["annotations"]
    image = report.inputs[0]["image"]
    for label, name, weights in (
        ("student", "student", folder / "student/student.pth"),
        ("vanilla", "twin", folder / "twin/student.pth"),
        ("teacher", "teacher", ROOT / TEACHER),
    ):
        results = read(folder / name / "results.json")["bbox"]
        for key in results:
            expected[f"{label}/{key}"] = results[key], 1
        plain = build_model(shapes_cfg("teacher" if name == "teacher" else "vanilla")).eval()
        expected[f"{label}/parameters"] = sum(p.numel() for p in plain.parameters()) / 1e6, 2
        expected[f"{label}/checkpoint"] = os.path.getsize(weights) / 1e6, 2
        plain.load_state_dict(torch.load(weights, weights_only=True)["model"], strict=False)
        flops = FlopCountAnalysis(OneImage(plain), (image,)).unsupported_ops_warnings(False)
        expected[f"{label}/flops"] = flops.uncalled_modules_warnings(False).total() / 1e9, 2
        found = detection_errors(
            objects, read(folder / name / "inference/coco_instances_results.json")
        )
        for kind in KINDS:
            expected[f"{label}/cost/{kind}"] = found.costs[kind], 1
            expected[f"{label}/count/{kind}"] = found.counts[kind], 0
        if name != "teacher":
            for line in (folder / name / "metrics.json").read_text().splitlines():
                values = json.loads(line)
                left = [k for k in values if k.endswith("time") or k in BOOKKEEPING]
                kept = {k: v for k, v in values.items() if k not in left}
                expected.update({f"{label}/{k}": (v, 4) for k, v in kept.items()})
    expected.update(expected_gains(folder))
    logged = {k.replace("student/", "vanilla/") for k in expected if "ssim_kd" in k}
    return {**expected, **dict.fromkeys(logged, (None, 4))}  # a row without the twin's value


def expected_gains(folder):
    """What the student gained on its twin, by the files, and its share of the teacher's lead."""
    found = [read(folder / n / "results.json")["bbox"] for n in ("student", "twin", "teacher")]
    expected = {}
    for key in ("AP", "APs", "APm", "APl", *(k for k in found[0] if k.startswith("AP-"))):
        s, v, t = (np.nan if f[key] is None else f[key] for f in found)
        expected[f"gain/{key}"] = s - v, 1
        expected[f"share/{key}"] = (100 * (s - v) / (t - v) if t > v else np.nan), 0
    return expected


def test_every_number_is_the_files(folder, report, page, few_shapes):
    shutil.copy(f"{few_shapes}/{FOLDER}/instances_val.json", folder.parent / "objects.json")
    expected = expected_numbers(folder, report)
    found = dict(page.numbers)
    for label in ("student", "vanilla", "teacher"):
        assert float(found.pop(f"{label}/speed")) > 0
    levels = {k: found.pop(k) for k in list(found) if re.match(r"p\d/", k)}
    assert found.keys() == expected.keys()
    for key, (value, digits) in expected.items():
        if value is None or np.isnan(value):
            assert found[key] == DASH, key
        else:
            assert float(found[key]) == pytest.approx(value, abs=0.51 * 10**-digits), key
    assert {k.split("/")[0] for k in levels} == {"p2", "p3", "p4", "p5"}
    check_levels(report, levels)


def check_levels(report, levels):
    """SSIM by level against the loss that training logs, image by image."""
    values = {level: [] for level in report.levels}
    for x in report.inputs:
        images = report.model.preprocess_image([x])
        with torch.no_grad(), EventStorage() as storage:
            maps = report.model.backbone(images.tensor)
            report.model.distiller([x], maps, images.tensor, report.model.preprocessing)
            for level in values:
                values[level].append(1 - 2 * storage.latest()[f"ssim_kd/{level}"][0])
    for level, found in values.items():
        assert float(levels[f"{level}/ssim"]) == pytest.approx(np.mean(found), abs=6e-4)
        assert float(levels[f"{level}/least"]) == pytest.approx(min(found), abs=6e-4)
        assert levels[f"{level}/channels"] == "64"
        flat = [float(levels[f"{level}/{whose}_flat"]) for whose in ("student", "teacher", "both")]
        assert 0 <= flat[2] <= min(flat) and max(flat) <= 100


def test_flat_cells_are_those_below_the_noise_floor():
    from ssimkd.losses import SSIMLoss
    from ssimkd.report.loss_maps import flat_cells

    options = SSIMLoss().options
    # alternating cells of +-a have the variance a^2 in the middle, C2 is 0.03^2
    cells = torch.arange(31)
    checks = ((cells[:, None] + cells) % 2 * 2 - 1).float()
    maps = torch.stack([0.029 * checks, 0.031 * checks])[None]
    assert flat_cells(maps, options)[0, :, 15, 15].tolist() == [1, 0]


def test_pictures_show_truth_and_every_detector(page, report):
    seen = {alt.split(": ")[1] for alt in page.images if ": " in alt}
    assert seen == {"ground truth", "student", "vanilla", "teacher", "where maps differ"}
    maps = [alt for alt in page.images if re.match(r"p\d ", alt)]
    assert len(maps) == 2 * 4 * 6  # images, levels, maps
    least = min(
        range(len(report.inputs)), key=lambda i: sum(lv.images[i] for lv in report.levels.values())
    )
    shown = [c["index"] for c in report.chosen()]
    assert len(set(shown)) == 6 and least in shown


def test_the_ring_is_where_the_maps_differ_most():
    rng = np.random.default_rng(0)
    maps = {level: {"SSIM": rng.uniform(0.5, 1, (40, 50))} for level in ("p2", "p3")}
    maps["p2"]["SSIM"][30, 10] = -1
    maps["p3"]["SSIM"][5, 5] = np.nan
    different, row, column = pictures.most_different(maps)
    assert (row, column) == (30, 10)
    assert different[30, 10] == pytest.approx(1 - (maps["p3"]["SSIM"][30, 10] - 1) / 2)
    assert different[5, 5] == 1 - maps["p2"]["SSIM"][5, 5]
    picture = pictures.draw_most_different(maps, 2.0)
    ring = np.argwhere((picture == (34, 211, 238)).all(axis=-1))
    assert abs(ring.mean(axis=0) / 13 - (30.5, 10.5)).max() < 0.2  # 50 pixels are drawn as 650


def test_a_box_is_drawn_at_its_place():
    image = np.zeros((100, 160, 3), np.uint8)  # drawn four times as large
    picture = pictures.draw_boxes(image, np.array([[20, 40, 60, 90]]), [2], ["disk"])
    drawn = (picture == pictures.PALETTE[2]).all(axis=-1)
    assert picture.shape == (400, 640, 3) and drawn[200, 80] and drawn[360, 160] and drawn[300, 240]
    assert not drawn[300, 160] and not drawn[200, 400]


def test_a_run_without_checkpoint_keeps_its_figures(folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "student")
    for path in (tmp_path / "student").glob("*.pth"):
        path.unlink()
    page = Page(Report(Run(str(tmp_path / "student")), []).html())
    assert "measurements of student are left out" in page.text and not page.images
    assert "This run has no teacher" not in page.text
    expected = read(folder / "student/results.json")["bbox"]["AP50"]
    assert float(page.numbers["student/AP50"]) == pytest.approx(expected, abs=0.06)


def test_what_a_run_started_from_is_not_its_detector(folder, tmp_path):
    """As of a run that was killed before its first checkpoint."""
    shutil.copy(folder / "student/student.pth", tmp_path / "start.pth")
    config = yaml.safe_load((folder / "twin/config.yaml").read_text())
    config["MODEL"]["WEIGHTS"] = str(tmp_path / "start.pth")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(folder / "twin/run.json", tmp_path)
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        Run(str(tmp_path)).build()
    record = read(tmp_path / "run.json")
    record[0]["command"] += " --eval-only"
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert Run(str(tmp_path)).build() is not None
    (tmp_path / "run.json").unlink()  # as of other code: its files tell whether it trained
    assert Run(str(tmp_path)).build() is not None
    (tmp_path / "metrics.json").touch()
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        Run(str(tmp_path)).build()


@pytest.mark.parametrize("left", ["backbone.bottom_up.", "backbone."])
def test_a_checkpoint_without_all_of_the_detector_is_refused(folder, tmp_path, left):
    shutil.copy(folder / "twin/config.yaml", tmp_path)
    state = torch.load(folder / "twin/student.pth")["model"]
    part = {name: tensor for name, tensor in state.items() if name.startswith(left)}
    torch.save({"model": part}, tmp_path / "student.pth")
    with pytest.raises(ConfigError, match="student.pth does not (fit the backbone|hold )"):
        Run(str(tmp_path)).build()


def test_without_its_adapters_a_students_maps_are_not_compared(folder, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "student")
    (tmp_path / "student/last_checkpoint").unlink()
    config = yaml.safe_load((folder / "student/config.yaml").read_text())
    config["MODEL"]["WEIGHTS"] = str(folder / "student/student.pth")
    (tmp_path / "evaluated").mkdir()
    (tmp_path / "evaluated/config.yaml").write_text(yaml.safe_dump(config))
    for name in ("student", "evaluated"):
        report = Report(Run(str(tmp_path / name)), [])
        assert report.model is not None and not report.levels
        assert any("student.pth does not hold the adapters" in note for note in report.notes)


def test_adapters_are_found_in_one_teachers_and_in_several_teachers_weights():
    zero = torch.zeros(2)
    names = ["distiller.adapters.p2.bias", "distiller.x.adapters.p2.bias"]
    others = ["distiller.x.losses.fgd.bias", "backbone.adapters.p2.bias"]
    found = adapters_in(dict.fromkeys([*names, *others], zero))
    assert found == {(name, zero.shape) for name in names}


class Bare(torch.nn.Module):
    """A detector without a `.backbone`."""

    def __init__(self, cfg):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)


def test_a_detector_without_a_backbone_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Bare", Bare)
    config = yaml.safe_load((folder / "twin/config.yaml").read_text())
    config["MODEL"]["META_ARCHITECTURE"] = "Bare"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    state = Bare(None).state_dict()
    torch.save({"model": state}, tmp_path / "student.pth")
    found = Run(str(tmp_path)).build().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    torch.save({"model": {**state, "net.bias": torch.full((2,), np.nan)}}, tmp_path / "student.pth")
    with pytest.raises(ConfigError, match=r"holds NaN or infinity in net\.bias"):
        Run(str(tmp_path)).build()
    torch.save({"model": {"net.bias": state["net.bias"]}}, tmp_path / "student.pth")
    with pytest.raises(ConfigError, match=r"does not hold net\.weight"):
        Run(str(tmp_path)).build()


def test_it_says_what_was_trained_and_how_to_do_it_again(page, folder):
    entry = read(folder / "student/run.json")[0]
    for words in (
        "DistillRCNN", TEACHER, "ssim (weight 16)", "adapter: conv1x1", entry["command"],
        f"Commit {entry['commit']}", f"torch {torch.__version__.split('+')[0]}",
        in_words(entry["ended"]), "4 x 2 images", "student.pth: float32", "ResNet-50",
        "MODEL.DISTILL.ADAPTER none conv1x1",
    ):  # fmt: skip
        assert words in page.text, words


def test_it_needs_nothing_beside_it(page, text):
    outside = [r for r in page.references if not r.startswith(("data:", "#"))]
    assert not outside and "<script" not in text and "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_a_run_without_teacher_or_evaluation_says_so(folder, tmp_path):
    shutil.copytree(folder / "twin", tmp_path / "twin")
    for left in ("results.json", "run.json", "inference/coco_instances_results.json"):
        (tmp_path / "twin" / left).unlink()
    page = Page(Report(Run(str(tmp_path / "twin")), []).html())
    for words in (
        "This run has no teacher", "This run was not evaluated", "no teacher to be similar to",
        "Command, commit and versions are not known", "Left out: the run has no inference/",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.numbers["twin/AP"] == DASH and float(page.numbers["twin/parameters"]) > 0


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


def test_a_later_evaluation_changes_neither_the_end_nor_the_label(folder, tmp_path):
    for name in ("student", "teacher"):
        shutil.copytree(folder / name, tmp_path / name)
    entries = read(folder / "student/run.json")
    later = {"command": "python train_net.py --eval-only", "ended": "2099-01-01T00:00:00+00:00"}
    (tmp_path / "student/run.json").write_text(json.dumps([*entries, {**entries[0], **later}]))
    assert Run(str(tmp_path / "student")).ended == in_words(entries[0]["ended"])
    page = Page(Report(Run(str(tmp_path / "teacher")), []).html())
    assert "teacher/AP" in page.numbers and "ended only evaluated, " in page.text
    assert "vanilla" not in page.text.partition("Run it again")[0]


def test_ap_of_other_data_is_named_and_not_compared(folder, tmp_path, data):
    shutil.copytree(folder / "twin", tmp_path / "twin")
    config = tmp_path / "twin/config.yaml"
    config.write_text(config.read_text().replace("- report_val", "- report_train"))
    report = Report(Run(str(folder / "student")), [Run(str(tmp_path / "twin"))])
    assert [row["dataset"] for row in report.head()][:2] == ["report_val", "report_train"]
    gains = report.gains()
    assert list(gains["results"]) == list(gains["errors"]) == ["student"]
    assert gains["elsewhere"] == ["vanilla (evaluated on report_train)"]


def test_settings_that_differ_between_runs_come_first(folder):
    runs = [Run(str(folder / name)) for name in ("student", "twin")]
    _, rows = differences(runs)
    differ = [len(set(row[2:])) > 1 for row in rows]
    assert differ == sorted(differ, reverse=True)
    keys = [row[0] for row in rows]
    assert "MODEL.DISTILL.ADAPTER" in keys[: sum(differ)]
    assert not any(key.startswith("MODEL.DISTILL.ICD.") for key in keys)
    assert "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS" not in keys  # its tuples became lists


def test_lists_of_nodes_alone_are_split():
    node = {"SIZES": [[32], [64]], "RATIOS": [(0.5, 1.0)], "COCO": [{"NAME": "a"}, {"NAME": "b"}]}
    split = {"COCO.0.NAME": "a", "COCO.1.NAME": "b"}
    assert flat(node) == {"SIZES": "[[32], [64]]", "RATIOS": "[[0.5, 1.0]]", **split}
    kept = {"SIZES.0": "[32]", "SIZES.1": "[64]", "RATIOS": "[(0.5, 1.0)]"}  # of checkpoints
    assert dict(flatten(node)) == {**kept, **{key: repr(x) for key, x in split.items()}}


def test_a_file_that_was_cut_off(folder, tmp_path):
    shutil.copy(folder / "twin/config.yaml", tmp_path)
    (tmp_path / "run.json").write_text('[{"command"')  # it is left out, with a warning
    assert Run(str(tmp_path)).results is not None
    (tmp_path / "results.json").write_text('{"bbox": {"AP"')
    with pytest.raises(ConfigError, match="results.json is no whole JSON"):
        _ = Run(str(tmp_path)).results


def test_a_model_that_cannot_be_built_or_read_is_noted(folder, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {_target_: builtins.Student}\n")
    with pytest.raises(ConfigError, match="its model cannot be built"):
        Run(str(tmp_path)).build()
    shutil.copytree(folder / "twin", tmp_path / "twin")
    torch.save({"model": {"x": Page}}, tmp_path / "twin/model_final.pth")
    with pytest.raises(ConfigError, match="is not read: it names .*Page"):
        Run(str(tmp_path / "twin")).build()


def test_scalars_of_a_resumed_and_of_a_killed_run(folder, tmp_path):
    shutil.copy(folder / "twin/config.yaml", tmp_path)
    lines = ['{"iteration": 1, "lr": 1}', '{"iteration": 2, "lr": 2}', '{"iteration": 2, "lr": 5}']
    (tmp_path / "metrics.json").write_text("\n".join([*lines, '{"iteration": 3, "l']))
    assert Run(str(tmp_path)).scalars["lr"] == ([1, 2], [1, 5])
    (tmp_path / "metrics.json").write_text("\n".join([lines[0], "{", lines[1]]))
    with pytest.raises(ConfigError, match=r"metrics.json: line 2 is no JSON"):
        _ = Run(str(tmp_path)).scalars


def test_a_record_of_every_command_and_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", "a b.yaml"])
    with record_run(str(tmp_path)):
        assert read_record(str(tmp_path))[0]["ended"] is None
    with pytest.raises(KeyError), record_run(str(tmp_path)):
        raise KeyError
    first, second = read_record(str(tmp_path))
    assert first["command"] == "python train_net.py --config-file 'a b.yaml'"
    assert first["started"] <= first["ended"] <= second["started"] and second["ended"] is None
    assert first["versions"]["torch"] == torch.__version__.split("+")[0]


def test_pictures_for_a_readme(report, tmp_path):
    paths = report.save_pictures(str(tmp_path / "pictures"))
    assert [os.path.basename(p) for p in paths] == ["detections.png", "similarity.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size[0] > 900 and os.path.getsize(path) < 150_000


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
        lazy_engine.lazy_train(cfg, False)
    text = Report(Run(str(out)), []).html()
    page = Page(text)
    assert "DistillRCNN" in page.text and "adapter: conv1x1" in page.text
    assert page.numbers["student/AP"] == f"{read(out / 'results.json')['bbox']['AP']:.1f}"
    assert float(page.numbers["teacher/parameters"]) > 1 and "p6/ssim" in page.numbers
    changed = {o.split("=")[0] for o in overrides if not o.startswith("+")}
    listed = re.findall(r"<tr><td><code>(.*?)</code>", text)
    assert {key for key in listed if not key.startswith("datasets.coco.")} == changed


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
