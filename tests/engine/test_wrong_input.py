"""Wrong input of every kind: one line that names what to change, status 1 or 2, nothing changed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, shapes_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from PIL import Image
from ssimkd import ConfigError
from ssimkd.commands import train as train_net
from ssimkd.errors import exit_in_one_line

HEADS = "MODEL.ROI_HEADS"
KD, TEACHER = "MODEL.DISTILL", "MODEL.DISTILL.TEACHER"
YAML, VANILLA = "configs/shapes/ssimkd.yaml", "configs/shapes/vanilla.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory, few_shapes):
    """Wrong files of every kind, by name; {files} in the cases below."""
    folder = tmp_path_factory.mktemp("files")
    texts = {
        "syntax.yaml": "MODEL: [1\n",
        "text.yaml": "hello",
        "list.yaml": "- 1\n- 2",
        "empty.py": "",
        "code.yaml": f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{folder}/ran]\n",
        "eval.yaml": f'SEED: !!python/object/apply:eval [\'open("{folder}/ran", "w")\']',
        "nan.yaml": weight(".nan"),
        "integer.yaml": weight("16"),
        "garbage.pth": "garbage",
        "garbage.pkl": "garbage",
        "empty.pth": "",
        "notes.txt": "",
        "garbage.json": "{",
        "list.json": "[]",
        "no_category.json": json.dumps({**COCO, "categories": []}),
        "no_area.json": json.dumps({**COCO, "annotations": [{**BOX, "area": None}]}),
        "negative.json": json.dumps({**COCO, "annotations": [{**BOX, "bbox": [1, 2, -3, 4]}]}),
        "nan.json": json.dumps({**COCO, "annotations": [{**BOX, "bbox": [1, 2, 3, float("nan")]}]}),
        "words.json": json.dumps({**COCO, "annotations": [{**BOX, "bbox": ["1", 2, 3, 4]}]}),
        "number.json": json.dumps({**COCO, "images": [7]}),
        "category.json": json.dumps({**COCO, "annotations": [{**BOX, "category_id": 9}]}),
        "no_file.json": json.dumps({**COCO, "images": [{**IMAGE, "file_name": "b.png"}]}),
        "deep.json": "[" * 200000,
        **{
            f"{name}.json": json.dumps({**COCO, "annotations": [{**BOX, **wrong}]})
            for name, wrong in WRONG_BOXES.items()
        },
        "good.json": json.dumps(COCO),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    torch.save([1, 2], folder / "list.pth")
    torch.save({"model": 3}, folder / "number.pth")
    torch.save({"model": {"a": "b"}}, folder / "text.pth")
    for name, config in (("student", "vanilla"), ("teacher", "teacher")):
        torch.manual_seed(0)
        state = build_model(shapes_cfg(config)).state_dict()
        torch.save({"model": state}, folder / f"{name}.pth")
    whole = (folder / "student.pth").read_bytes()
    (folder / "half.pth").write_bytes(whole[: len(whole) // 2])
    state["backbone.fpn_output3.weight"][0] = float("nan")
    torch.save({"model": state}, folder / "nan.pth")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "a.png")
    yield folder
    for name in [name for name in DatasetCatalog if name == "own"]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def weight(value):
    return f"_BASE_: {ROOT}/{YAML}\nMODEL:\n  DISTILL:\n    SSIM:\n      WEIGHT: {value}\n"


IMAGE = {"id": 1, "file_name": "a.png", "height": 32, "width": 32}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81, "iscrowd": 0}
COCO = {"images": [IMAGE], "annotations": [BOX], "categories": [{"id": 1, "name": "crack"}]}


WRONG_BOXES = {
    "true": {"bbox": [True, 2, 9, 9]},
    "crowd": {"iscrowd": 2},
    "outside": {"bbox": [40, 2, 9, 9]},
    "rle": {"segmentation": {"size": [1, 1]}},
    "polygon": {"segmentation": [["a", 2, 3, 4, 5, 6]]},
    "points": {"keypoints": "abc"},
}


def own(name):
    entry = f"[{{'NAME': 'own', 'JSON': '{{files}}/{name}', 'IMAGES': '{{files}}'}}]"
    return [YAML, "DATASETS.COCO", entry, "DATASETS.TEST", "('own',)"]


def evaluate(weights):
    return [VANILLA, "--eval-only", "MODEL.WEIGHTS", f"{{files}}/{weights}"]


# Command line behind --config-file -> what the line says.
CASES = [
    # the command line
    ([], "expected one argument"),
    ([""], "--config-file is missing"),
    ([YAML, "--no-flag"], "unrecognized arguments: --no-flag"),
    ([YAML, "--num-gpus", "x"], "--num-gpus: invalid int value: 'x'"),
    ([YAML, "--num-gpus", "-1"], "--num-gpus is -1"),
    ([YAML, "--num-machines", "0"], "--num-machines is 0"),
    ([YAML, "--machine-rank", "3"], "--machine-rank is 3"),
    *(([YAML, "--timeout", x], "--timeout: must be above 0") for x in ("nan", "1e300", "0", "-1")),
    ([YAML, "--timeout", "x"], "--timeout: invalid minutes value: 'x'"),
    ([YAML, "--num-machines", "2", "--dist-url", "x"], "--dist-url: x is no address"),
    ([YAML, "MODEL.DEVICE"], "MODEL.DEVICE: AssertionError: Override list has odd length"),
    ([YAML, "SOLVER.MAX_ITER", "5", "--resume"], "--resume: flags stand before the overrides"),
    ([VANILLA, "--eval-only", "--resume"], "MODEL.WEIGHTS is empty"),
    # config files
    (["nowhere.yaml"], "--config-file: nowhere.yaml is neither a .yaml or .py file"),
    (["configs"], "--config-file: configs is neither"),
    (["{files}/notes.txt"], "notes.txt must end in .yaml or .py"),
    (["{files}/syntax.yaml"], "syntax.yaml, line "),
    (["{files}/text.yaml"], "text.yaml holds no keys"),
    (["{files}/list.yaml"], "list.yaml holds no keys"),
    (["{files}/empty.py"], "train"),
    (["{files}/code.yaml"], "code.yaml, line 1: code in a .yaml is not run"),
    (["{files}/eval.yaml"], "eval.yaml, line 1: code in a .yaml is not run"),
    (["{files}/nan.yaml"], f"{KD}.SSIM: weight must be a finite number >= 0, got nan"),
    (["{files}/integer.yaml"], f"{KD}.SSIM.WEIGHT; write it with a decimal point"),
    # the distillation
    ([YAML, f"{KD}.SSIM.WEIGHT", "nan"], f"{KD}.SSIM.WEIGHT"),
    ([YAML, f"{KD}.SSIM.WEIGHT", "-1"], f"{KD}.SSIM: weight must be a finite number >= 0"),
    ([YAML, f"{KD}.SSIM.WEIGHT", "1e400"], f"{KD}.SSIM: weight must be a finite number >= 0"),
    ([YAML, f"{KD}.SSIM.HEFT", "1.0"], f"{KD}.SSIM.HEFT"),
    ([YAML, f"{KD}.SSIM.WINDOW_SIZE", "4"], f"{KD}.SSIM: window_size must be an odd"),
    ([YAML, f"{KD}.SSIM.SIGMA", "1e400"], f"{KD}.SSIM: sigma must be positive and finite"),
    ([YAML, f"{KD}.SSIM.BORDER", "wrap"], f"{KD}.SSIM: border must be one of"),
    ([YAML, f"{KD}.SSIM.NORMALIZE", "max"], f"{KD}.SSIM: normalize must be one of"),
    ([YAML, f"{KD}.SSIM.EXPONENTS", "(1,1)"], f"{KD}.SSIM: exponents must be three numbers"),
    ([YAML, f"{KD}.SSIM.EXPONENTS", "(1,'a',1)"], f"{KD}.SSIM: "),
    ([YAML, f"{KD}.CWD.TAU", "0"], f"{KD}.CWD: tau must be a finite number > 0"),
    ([YAML, f"{KD}.LOSSES", "('x',)"], f"{KD}.LOSSES: there is no loss 'x'"),
    ([YAML, f"{KD}.LOSSES", "ssim"], f"{KD}.LOSSES"),
    ([YAML, f"{KD}.LOSSES", "(1,)"], f"{KD}.LOSSES: there is no loss 1"),
    ([YAML, f"{KD}.LOSSES", "('l1','l1')"], f"{KD}.LOSSES names a loss twice"),
    ([YAML, f"{KD}.IN_FEATURES", "['p9']"], f"{KD}.IN_FEATURES: the student has no p9"),
    ([YAML, f"{KD}.IN_FEATURES", "[]"], f"{KD}.IN_FEATURES is empty"),
    ([YAML, f"{KD}.IN_FEATURES", "[2]"], f"{KD}.IN_FEATURES must hold different names"),
    ([YAML, f"{KD}.IN_FEATURES", "['p2','p2']"], f"{KD}.IN_FEATURES must hold different names"),
    ([YAML, f"{KD}.ADAPTER", "conv3x3"], f"{KD}.ADAPTER: 'conv3x3' is none of"),
    ([YAML, f"{KD}.WARMUP_ITERS", "-3"], f"{KD}.WARMUP_ITERS must be"),
    ([YAML, f"{KD}.CHECK_IMAGES", "-1"], f"{KD}.CHECK_IMAGES must be"),
    ([YAML, f"{KD}.INHERIT", "['no']"], f"{KD}.INHERIT: the student has no weights in 'no'"),
    ([YAML, f"{KD}.INHERIT", "[3]"], f"{KD}.INHERIT must hold different names"),
    ([YAML, f"{KD}.TEACHERS", "[3]"], f"{TEACHER}.CONFIG and .TEACHERS are both set"),
    ([YAML, f"{TEACHER}.CONFIG", "", f"{KD}.TEACHERS", "[3]"], f"{KD}.TEACHERS: an entry is"),
    ([YAML, f"{KD}.TEACHERS", "[{'LOSS_WEIGHT':'x'}]", f"{TEACHER}.CONFIG", ""], f"{KD}.TEACHERS"),
    # the teacher
    ([YAML, f"{TEACHER}.CONFIG", ""], f"{TEACHER}.CONFIG is empty"),
    ([YAML, f"{TEACHER}.CONFIG", "nowhere"], f"{TEACHER}.CONFIG: nowhere is neither"),
    ([YAML, f"{TEACHER}.CONFIG", "{files}/code.yaml"], "code in a .yaml is not run"),
    ([YAML, f"{TEACHER}.OPTS", "['A']"], f"{TEACHER}.CONFIG or .OPTS: "),
    ([YAML, f"{TEACHER}.LOSS_WEIGHT", "-1"], f"{TEACHER}.LOSS_WEIGHT must be"),
    ([YAML, f"{TEACHER}.WEIGHTS", "no.pth"], f"{TEACHER}.WEIGHTS: there is no file no.pth"),
    (
        [YAML, f"{TEACHER}.WEIGHTS", "{files}/student.pth"],
        "does not fit the backbone of its config",
    ),
    ([YAML, f"{TEACHER}.WEIGHTS", "{files}/nan.pth"], "holds NaN or infinity in backbone.fpn_ou"),
    # the model and its weights
    ([YAML, "MODEL.META_ARCHITECTURE", "Nothing"], "MODEL: KeyError: \"No object named 'Nothing'"),
    ([YAML, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "GeneralizedRCNN does not distil"),
    ([YAML, "MODEL.RESNETS.DEPTH", "51"], "MODEL: KeyError: 51"),
    ([YAML, "MODEL.FPN.NORM", "XX"], "MODEL: KeyError: 'XX'"),
    ([YAML, "MODEL.PIXEL_MEAN", "[1.0]"], "MODEL.PIXEL_MEAN must hold the 3 numbers of INPUT"),
    ([YAML, "MODEL.PIXEL_STD", "[0.0,1.0,1.0]"], "MODEL.PIXEL_STD must be a finite number of at"),
    ([YAML, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[]]"], "ASPECT_RATIOS is empty, or has a"),
    ([YAML, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "-1"], "MODEL.RPN.PRE_NMS_TOPK_TRAIN must be"),
    ([YAML, "MODEL.RPN.POST_NMS_TOPK_TRAIN", "0"], "MODEL.RPN.POST_NMS_TOPK_TRAIN must be"),
    ([YAML, f"{HEADS}.BATCH_SIZE_PER_IMAGE", "0"], f"{HEADS}.BATCH_SIZE_PER_IMAGE must be"),
    (
        [YAML, f"{HEADS}.POSITIVE_FRACTION", "7.0"],
        f"{HEADS}.POSITIVE_FRACTION must be a finite number of at least 0.0 and at most 1.0",
    ),
    ([YAML, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "0"], "ROI_BOX_HEAD.POOLER_RESOLUTION must"),
    ([YAML, "MODEL.ROI_HEADS.NUM_CLASSES", "3"], "4 thing classes and the head has 3"),
    ([YAML, "MODEL.ROI_HEADS.NUM_CLASSES", "0"], "MODEL.ROI_HEADS.NUM_CLASSES must be"),
    ([YAML, "MODEL.DEVICE", "cpuu"], "MODEL.DEVICE: "),
    ([YAML, "MODEL.WEIGHTS", "{files}"], "MODEL.WEIGHTS: there is no file "),
    ([YAML, "MODEL.WEIGHTS", "{files}/teacher.pth"], "teacher.pth is another model's: backbone."),
    ([YAML, "MODEL.WEIGHTS", "http://127.0.0.1:9/x.pth"], "MODEL.WEIGHTS: cannot fetch http:"),
    (evaluate("garbage.pth"), "MODEL.WEIGHTS: {files}/garbage.pth cannot be read"),
    (evaluate("garbage.pkl"), "MODEL.WEIGHTS: {files}/garbage.pkl cannot be read"),
    (evaluate("empty.pth"), "MODEL.WEIGHTS: {files}/empty.pth cannot be read"),
    (evaluate("half.pth"), "MODEL.WEIGHTS: {files}/half.pth cannot be read"),
    (evaluate("notes.txt"), "MODEL.WEIGHTS: {files}/notes.txt cannot be read"),
    (evaluate("list.pth"), "list.pth holds a list instead of tensors by name"),
    (evaluate("number.pth"), "MODEL.WEIGHTS: {files}/number.pth cannot be loaded"),
    (evaluate("text.pth"), "MODEL.WEIGHTS: {files}/text.pth cannot be loaded"),
    (evaluate("teacher.pth"), "MODEL.WEIGHTS: {files}/teacher.pth does not fit the model"),
    ([*evaluate("student.pth"), "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    # the schedule and the machine
    ([YAML, "SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH must be an integer of at least 1"),
    ([YAML, "SOLVER.MAX_ITER", "-5"], "SOLVER.MAX_ITER must be"),
    ([YAML, "SOLVER.MAX_ITER", "5.5"], "SOLVER.MAX_ITER"),
    ([YAML, "SOLVER.BASE_LR", "-1.0"], "SOLVER.BASE_LR must be a finite number of at least 0.0"),
    ([YAML, "SOLVER.BASE_LR", "1e400"], "SOLVER.BASE_LR must be a finite number"),
    ([YAML, "SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD must be"),
    ([YAML, "SOLVER.WARMUP_ITERS", "-1"], "SOLVER.WARMUP_ITERS must be"),
    ([YAML, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "-1.0"], "CLIP_GRADIENTS.CLIP_VALUE must be"),
    ([YAML, "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "0.0"], "CLIP_GRADIENTS.NORM_TYPE must be"),
    ([YAML, "SOLVER.REFERENCE_WORLD_SIZE", "7"], "must be a multiple of SOLVER.REFERENCE_WORLD_SI"),
    (
        [YAML, "SEED", "99999999999999"],
        "SEED must be an integer of at least -2147483648 and at mos",
    ),
    ([YAML, "TEST.EVAL_PERIOD", "-1"], "TEST.EVAL_PERIOD must be"),
    ([YAML, "TEST.DETECTIONS_PER_IMAGE", "-5"], "TEST.DETECTIONS_PER_IMAGE must be"),
    ([YAML, "TEST.EXPECTED_RESULTS", "[['x']]"], "TEST.EXPECTED_RESULTS: an entry is [task, metri"),
    ([YAML, "SOLVER.STEPS", "(9,3)"], "SOLVER: ValueError: Milestone must be smaller"),
    ([YAML, "SOLVER.LR_SCHEDULER_NAME", "X"], "SOLVER: ValueError: Unknown LR scheduler: X"),
    ([YAML, "DATALOADER.NUM_WORKERS", "-1"], "DATALOADER.NUM_WORKERS must be"),
    ([YAML, "DATALOADER.SAMPLER_TRAIN", "X"], "DATALOADER or INPUT: ValueError: Unknown training"),
    ([YAML, "OUTPUT_DIR", ""], "OUTPUT_DIR must name the folder"),
    ([YAML, "OUTPUT_DIR", "s3://bucket/x"], "OUTPUT_DIR: s3://bucket/x is no folder"),
    ([YAML, "OUTPUT_DIR", "{files}/notes.txt"], "OUTPUT_DIR: {files}/notes.txt cannot be written"),
    ([YAML, "OUTPUT_DIR", "{files}/notes.txt/x"], "{files}/notes.txt is no folder"),
    # the data
    ([YAML, "DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    ([YAML, "DATASETS.TRAIN", "('shape',)"], "DATASETS.TRAIN: no data set 'shape' is registered"),
    ([YAML, "DATASETS.TRAIN", "5"], "DATASETS.TRAIN"),
    ([YAML, "DATASETS.COCO", "[3]"], "DATASETS.COCO: an entry is a mapping"),
    ([YAML, "INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN is empty"),
    *(
        ([YAML, "INPUT.MIN_SIZE_TRAIN", x], "INPUT.MIN_SIZE_TRAIN must be an integer of at least 1")
        for x in ("(0,)", "(-1,)", "('a',)")
    ),
    ([YAML, "INPUT.FORMAT", "CMYK"], "MODEL.PIXEL_MEAN must hold the 4 numbers of INPUT.FORMAT"),
    ([YAML, "INPUT.MAX_SIZE_TRAIN", "-1"], "INPUT.MAX_SIZE_TRAIN must be"),
    *(
        ([YAML, "INPUT.FORMAT", x], f"INPUT.FORMAT: '{x}' is none of BGR, ")
        for x in ("XYZ", "YUV-BT.601", "P")
    ),
    (
        [YAML, "INPUT.FORMAT", "L", "MODEL.PIXEL_STD", "[1.0]"],
        "MODEL.PIXEL_STD must hold the 3 numbers of INPUT.FORMAT L, got [1.0]",
    ),
    ([YAML, "INPUT.FORMAT", "HSV"], "INPUT.FORMAT (.yaml) or model.input_format (.py) is 'HSV'"),
    ([*evaluate("student.pth"), "INPUT.FORMAT", "F"], "INPUT.FORMAT: 'F' is none of"),
    (own("nowhere.json"), "own: {files}/nowhere.json cannot be read: FileNotFoundError"),
    (own("garbage.json"), "own: {files}/garbage.json cannot be read: JSONDecodeError"),
    (own("list.json"), "own: {files}/list.json has no list 'images'"),
    (own("no_category.json"), "no_category.json has no categories"),
    (own("category.json"), "category.json has an annotation of the unknown category_id 9"),
    (own("no_area.json"), "no_area.json has an entry of 'annotations' with a wrong 'area'"),
    (own("negative.json"), "negative.json has a bbox that is not [x, y, width, height]"),
    (own("nan.json"), "nan.json has a bbox that is not [x, y, width, height]"),
    (own("words.json"), "words.json has a bbox that is not [x, y, width, height]"),
    (own("number.json"), "number.json has an entry of 'images' that is no mapping"),
    (own("deep.json"), "own: {files}/deep.json cannot be read: RecursionError"),
    (own("true.json"), "true.json has a bbox that is not [x, y, width, height]"),
    (own("crowd.json"), "crowd.json has an 'iscrowd' that is neither 0 nor 1"),
    (own("outside.json"), "outside.json has no box with an area inside its image"),
    (own("rle.json"), "rle.json has a 'segmentation' that is no list of polygons, nor RLE"),
    (own("polygon.json"), "polygon.json has a 'segmentation' that is no list of polygons"),
    (own("points.json"), "points.json has 'keypoints' that are not [x, y, v, ...]"),
    (own("no_file.json"), "no_file.json names the image {files}/b.png, which does not exist"),
    (own("good.json"), "own has 1 thing classes and the head has 4: set MODEL.ROI_HEADS.NUM_CLA"),
]


class StartedError(Exception):
    """The training began: the input was taken for right."""


def start(self):
    raise StartedError


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def said_by(words, monkeypatch, capsys):
    """Runs the command in this process; the one line that it ends with."""
    monkeypatch.setattr(SimpleTrainer, "run_step", start)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train_net.main(words)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err.rstrip("\n")


def check(words, expected, files, tmp_path, monkeypatch, capsys):
    before, folder = contents(files), str(files)
    line = said_by(words, monkeypatch, capsys)
    assert line.startswith("error: ") and "\n" not in line
    assert expected.replace("{files}", folder) in line
    assert contents(files) == before and not (files / "ran").exists()
    # the run's own log may be there, nothing else
    assert {path.name for path in contents(tmp_path)} <= {"log.txt", "config.yaml", "run.json"}


@pytest.mark.parametrize("key", ["IN_FEATURES", "LOG_GRADIENTS", "SSIM.WEIGHT", "TEACHER.OPTS"])
def test_none_is_no_value(key, monkeypatch, capsys):
    words = ["--config-file", "configs/shapes/ssimkd.yaml", f"MODEL.DISTILL.{key}", "None"]
    assert f"MODEL.DISTILL.{key} is None" in said_by(words, monkeypatch, capsys)


@pytest.mark.parametrize("words, expected", CASES)
def test_a_yaml_run(words, expected, files, few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    words = ["--config-file", *(word.replace("{files}", str(files)) for word in words)]
    if "OUTPUT_DIR" not in words and len(words) % 2 == 0 and words[-1].endswith(".yaml"):
        words += ["OUTPUT_DIR", str(tmp_path / "out")]
    check(words, expected, files, tmp_path, monkeypatch, capsys)


def test_these_are_enough():
    assert len(CASES) + len(LAZY_CASES) >= 60


MAPPER = "dataloader.train.mapper"
LAZY_CASES = [
    ("nothing=1", "nothing: there are the keys"),
    ("model.nothing.x=1", "model.nothing"),
    ("a=b=c", "a: there are the keys"),
    ("train.max_iters=3", "train.max_iters"),
    ("train.max_iter=x", "train.max_iter must be an integer of at least 1, got 'x'"),
    ("train.max_iter=-1", "train.max_iter must be"),
    ("train.max_iter=null", "train.max_iter must be an integer of at least 1, got None"),
    ("train.eval_period=x", "train.eval_period must be"),
    ("train.ddp=3", "train.ddp must be a node, got 3"),
    ("train.checkpointer=3", "train.checkpointer must be a node, got 3"),
    ("train.checkpointer.max_to_keep=-1", "train.checkpointer.max_to_keep must be"),
    ("train.checkpointer.max_to_keep=x", "train.checkpointer.max_to_keep must be"),
    ("optimizer.params=3", "optimizer.params must be a node"),
    ("optimizer.params.weight_decay_norm=x", "optimizer.params.weight_decay_norm must be"),
    ("+datasets=3", "datasets: there are the keys coco, num_classes_from_data, got 3"),
    ("+datasets.coco=3", "datasets.coco must be a list, got 3"),
    ("+dataloader.train.skip_bad_images=x", "skip_bad_images must be True or False, got 'x'"),
    ("+model.distiller.check_images=1.5", f"{KD}.CHECK_IMAGES must be an integer >= 0, got 1.5"),
    ("+model.distiller.mask_padding=3", f"{KD}.MASK_PADDING must be True or False, got 3"),
    ("+model.distiller.teacher.compile=on", f"{TEACHER}.COMPILE must be True or False, got 'on'"),
    ("train.log_period=0", "train.log_period must be"),
    ("train.checkpointer.period=0", "train.checkpointer.period must be"),
    ("train.device=cpuu", "train.device: "),
    ("train.output_dir={files}/notes.txt/x", "train.output_dir: {files}/notes.txt/x cannot be"),
    ("train.output_dir=s3://bucket/x", "train.output_dir: s3://bucket/x is no folder"),
    ("train.init_checkpoint=no.pth", "train.init_checkpoint: there is no file no.pth"),
    ("dataloader.train.dataset.names=no", "dataloader.train.dataset.names: no data set 'no'"),
    ("dataloader.train.dataset.names=[]", "dataloader.train.dataset.names is empty"),
    ("dataloader.train.total_batch_size=0", "dataloader.train.total_batch_size must be"),
    ("dataloader.train.num_workers=-1", "dataloader.train.num_workers must be"),
    ("optimizer.lr=-1", "optimizer.lr must be a finite number of at least 0.0, got -1"),
    ("optimizer.lr=nan", "optimizer.lr must be a finite number"),
    ("optimizer=3", "optimizer must be a node"),
    ("model=3", "model must be a node"),
    ("model.distiller=3", "model.distiller"),
    ("model.distiller.losses=ssim", "model.distiller"),
    ("model.distiller.losses.0=3", "model.distiller"),
    ("model.distiller.losses.0.weight=nan", "weight must be a finite number >= 0, got nan"),
    ("model.distiller.losses.0.weight=-1", "weight must be a finite number >= 0, got -1"),
    ("+model.distiller.losses.0.heft=1", "heft"),
    ("model.distiller.losses.0.border=wrap", "border must be one of"),
    ("model.distiller.in_features=[]", f"{KD}.IN_FEATURES is empty"),
    ("model.distiller.adapter=x", f"{KD}.ADAPTER: 'x' is none of"),
    ("+model.distiller.teacher.weight=x", f"{TEACHER}: "),
    ("train.amp.enabled=True", "train.amp.enabled"),
    *(
        (f"{MAPPER}.image_format={x}", f"{MAPPER}.image_format: {y} is none of BGR, ")
        for x, y in (("XYZ", "'XYZ'"), ("YUV-BT.601", "'YUV-BT.601'"), ("null", "None"))
    ),
    (
        f"{MAPPER}.image_format=CMYK",
        f"model.pixel_mean must hold the 4 numbers of {MAPPER}.image_format CMYK, got [103.53, ",
    ),
]


@pytest.mark.parametrize("override, expected", LAZY_CASES)
def test_a_lazy_run(override, expected, files, few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    words = [
        "--config-file", "configs/ssimkd_R50.py",
        "model.distiller.teacher.config=configs/shapes/teacher.yaml",
        "model.distiller.teacher.weights=configs/shapes/teacher.pth",
        "dataloader.train.dataset.names=ssimkd_shapes_train",
        "dataloader.test.dataset.names=ssimkd_shapes_val", "train.device=cpu",
        "train.init_checkpoint=", f"train.output_dir={tmp_path}/out",
        override.replace("{files}", str(files)),
    ]  # fmt: skip
    check(words, expected, files, tmp_path, monkeypatch, capsys)
    assert not contents(tmp_path)


def test_what_no_check_knows_of_ends_in_one_line_as_well(few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    words = ["--config-file", "tests/engine/lazy_shapes.py", f"train.output_dir={tmp_path}"]
    line = said_by([*words, "+train.checkpointer.x=1"], monkeypatch, capsys)
    assert line.startswith("error: train.checkpointer: TypeError: ")
    monkeypatch.setattr("ssimkd.engine.yaml_driver.build_pictures", lambda *_: 1 / 0)
    words = ["--config-file", YAML, "OUTPUT_DIR", str(tmp_path)]
    line = said_by(words, monkeypatch, capsys)
    assert line == "error: the config: ZeroDivisionError: division by zero"


def test_an_integer_is_a_weight(few_shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)
    monkeypatch.setattr(SimpleTrainer, "run_step", start)
    words = ["--config-file", YAML, "OUTPUT_DIR", str(tmp_path), f"{KD}.SSIM.WEIGHT", "16"]
    with pytest.raises(StartedError):
        train_net.main(words)
    assert "WEIGHT: 16.0" in (tmp_path / "config.yaml").read_text()


def test_debug_shows_the_traceback(monkeypatch, capsys):
    with pytest.raises(ConfigError, match="MAX_ITER"):
        train_net.main(["--config-file", YAML, "--debug", "SOLVER.MAX_ITER", "-1"])


def test_losses_that_are_not_finite_end_in_one_line():
    message = "loss is nan at iteration 3"
    with pytest.raises(SystemExit, match=f"^error: {message}$"), exit_in_one_line():
        raise FloatingPointError(message)


@pytest.mark.parametrize(
    "words, status, expected",
    [
        ([YAML, "--num-gpus", "-1"], 1, "--num-gpus is -1"),
        ([YAML, "--num-gpus", "x"], 2, "invalid int value: 'x'"),
    ],
)
def test_as_a_process(words, status, expected, few_shapes):
    env = {**os.environ, "DETECTRON2_DATASETS": few_shapes}
    done = subprocess.run(
        [sys.executable, "train_net.py", "--config-file", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == status and len(errors) == 1 and expected in errors[0]
    assert "Traceback" not in done.stderr
