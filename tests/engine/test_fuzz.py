"""Random overrides and annotation files: each is taken, or refused in one line.

A seeded mutator, so that a failure comes again. `make soak` runs many more.
"""

import copy
import json
import random

import numpy as np
import pytest
from conftest import shapes_cfg
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from ssimkd.data.datasets import register_coco
from ssimkd.engine.arguments import argument_parser, check_config, load_arguments
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.errors import exit_in_one_line

VALUES = [
    "0", "-1", "1", "2.5", "1e400", "-0.0", "nan", "inf", "None", "True", "''", "x", "()", "(1,)",
    "[]", "[[]]", "{}", "{'a': 1}", "('p2',)", "['p3', 'p3']", "(1e9, -1e9)", "9" * 30, "3j",
    "../..", "a b", "\u00fc\u2603", "[None]", "b'x'", "1" * 400, "${a}", "(", "\\", "\n", "%s", "*",
]  # fmt: skip


def keys_of(node, prefix=""):
    for name, value in node.items():
        yield from keys_of(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else ()
        yield prefix + name


def refused(action, *args):
    """Whether an action ends in an error of one line; any other exception is a failure."""
    try:
        with exit_in_one_line():
            action(*args)
    except SystemExit as end:
        assert end.code.startswith("error: ") and len(end.code.splitlines()) == 1, args
        return True
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {args}") from error
    return False


def load(*words):
    args = argument_parser().parse_args(words)
    check_config(load_arguments(args), args)


def fuzz_yaml(rng, rounds):
    keys = list(keys_of(shapes_cfg("ssimkd")))
    own = [key for key in keys if ".DISTILL." in key or key.startswith(("DATASETS", "DATALOADER"))]
    outcomes = set()
    for _ in range(rounds):
        words = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            key = rng.choice(own if rng.random() < 0.7 else keys)
            if rng.random() < 0.1:
                key = key[: rng.randrange(len(key))] + rng.choice(["", "X", ".", ".."])
            words += [key, rng.choice(VALUES)]
        words = words[: len(words) - (rng.random() < 0.03)]
        outcomes.add(refused(load, "--config-file", "configs/shapes/ssimkd.yaml", *words))
    assert outcomes == {True, False}


LAZY = [
    "model", "model.distiller", "model.distiller.losses", "model.distiller.losses.0.weight",
    "model.distiller.losses.0.normalize", "model.distiller.teacher", "model.distiller.adapter",
    "model.distiller.teacher.config", "model.distiller.in_features", "model.distiller.inherit",
    "model.roi_heads.num_classes", "train.max_iter", "train.device", "train.output_dir", "train",
    "train.init_checkpoint", "train.amp.enabled", "train.checkpointer", "train.checkpointer.period",
    "train.log_period", "optimizer", "optimizer.lr", "lr_multiplier", "dataloader",
    "dataloader.train", "dataloader.train.total_batch_size", "dataloader.train.dataset.names",
    "dataloader.test.dataset.names", "dataloader.train.num_workers", "nothing", "train.nothing",
]  # fmt: skip


def fuzz_lazy(rng, rounds):
    outcomes = set()
    base = ["train.device=cpu", "train.init_checkpoint="]
    base += [f"dataloader.{s}.dataset.names=ssimkd_shapes_train" for s in ("train", "test")]
    for _ in range(rounds):
        sign = rng.choice(["", "", "", "", "+", "++", "~"])
        override = f"{sign}{rng.choice(LAZY)}={rng.choice(VALUES)}"
        override = override[: len(override) - rng.choice([0] * 20 + [1, 4])]
        outcomes.add(refused(load, "--config-file", "configs/ssimkd_R50.py", *base, override))
    assert outcomes == {True, False}


COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 32, "width": 48} for i in range(2)],
    "annotations": [
        {
            "id": i,
            "image_id": i % 2,
            "category_id": 1 + i % 3,
            "bbox": [1, 2, 9, 9 + i],
            "area": 81,
            "iscrowd": 0,
            "segmentation": [[1, 2, 9, 2, 9, 9]],
            "keypoints": [1, 1, 2],
        }
        for i in range(4)
    ],
    "categories": [{"id": i + 1, "name": f"kind{i}", "keypoints": ["k"]} for i in range(3)],
}
JSON = [
    None, True, 0, -1, 1, 1.5, 10**400, float("nan"), float("inf"), "", "x", "\u2603", [], [[]], {},
    [1], [1, 2, 3, 4], [None] * 4, {"a": 1}, "../../etc", [[1, 2]], [[1, "a"] * 3], {"counts": []},
    {"counts": "x", "size": [1, 1]}, ["k", 1],
]  # fmt: skip


def places(node, path=()):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def mutated(rng):
    content = copy.deepcopy(COCO)
    for _ in range(rng.choice([1, 1, 2])):
        *path, key = rng.choice(list(places(content)))
        node = content
        for step in path:
            node = node[step]
        action = rng.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = rng.choice(JSON)
    return content


def take(name, folder, text):
    """Checked as DATASETS.COCO is, then taken through Detectron2's reader and mapper."""
    path = folder / "own.json"
    path.write_text(text)
    entry = {"NAME": name, "JSON": str(path), "IMAGES": str(folder)}
    register_coco([entry], [name], [name])
    cfg = shapes_cfg("vanilla", "DATASETS.TRAIN", (name,), "SOLVER.IMS_PER_BATCH", 2)
    cfg.MODEL.MASK_ON = len(text) % 2 == 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    DistillTrainer.build_train_loader(cfg).peek(2)


def fuzz_coco(rng, rounds, folder):
    for i in range(2):
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(folder / f"{i}.png")
    outcomes = set()
    for number in range(rounds):
        text = json.dumps(mutated(rng))
        if rng.random() < 0.1:
            cut = rng.randrange(len(text))
            text = text[:cut] + rng.choice(["", "x", '"', "}"]) + text[cut + rng.randrange(3) :]
        name = f"fuzz_{number}"
        try:
            outcomes.add(refused(take, name, folder, text))
        finally:
            for catalog in (DatasetCatalog, MetadataCatalog):
                if name in catalog:
                    catalog.remove(name)
    assert outcomes == {True, False}


@pytest.fixture(autouse=True)
def data(few_shapes, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", few_shapes)


def test_overrides_of_a_yaml_config():
    fuzz_yaml(random.Random(0), 150)


def test_overrides_of_a_lazy_config():
    fuzz_lazy(random.Random(0), 12)


def test_annotation_files(tmp_path):
    fuzz_coco(random.Random(0), 80, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_more(tmp_path, seed):
    rng = random.Random(seed)
    fuzz_yaml(rng, 3000)
    fuzz_lazy(rng, 300)
    fuzz_coco(rng, 2000, tmp_path)
