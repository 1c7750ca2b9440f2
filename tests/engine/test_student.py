"""`build_student` does for a training loop of one's own what the drivers do before theirs."""

import pytest
import ssimkd
import torch
from conftest import image_batch, shapes_cfg
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from ssimkd import ConfigError
from ssimkd.data.shapes import CLASSES, FOLDER
from ssimkd.utils.config_files import load_config

TEACHER = "configs/shapes/teacher.pth"
INHERIT = ["proposal_generator"]


@pytest.fixture
def own(few_shapes):
    """An entry of DATASETS.COCO that is not registered yet."""
    root = f"{few_shapes}/{FOLDER}"
    yield {"NAME": "own_loop", "JSON": f"{root}/instances_val.json", "IMAGES": f"{root}/val"}
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "own_loop" in catalog.list():
            catalog.remove("own_loop")


def yaml_config(own):
    cfg = shapes_cfg("ssimkd", "DATASETS.TRAIN", ("own_loop",), "DATASETS.TEST", ())
    cfg.DATASETS.COCO = [own]
    cfg.DATASETS.NUM_CLASSES_FROM_DATA = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.MODEL.DISTILL.INHERIT = INHERIT
    cfg.freeze()
    return cfg


def lazy_config(own):
    entry = ",".join(f"{key.lower()}:'{value}'" for key, value in own.items())
    overrides = [
        f"+datasets.coco=[{{{entry}}}]",
        "dataloader.train.dataset.names=own_loop",
        f"+train.inherit=[{','.join(INHERIT)}]",
    ]
    cfg = load_config("tests/engine/lazy_shapes.py", overrides)
    cfg.train.pop("init_checkpoint")  # a loop of one's own may do without
    return cfg


@pytest.mark.parametrize("config", [yaml_config, lazy_config])
def test_a_student_for_a_loop_of_ones_own_is_complete(own, config, caplog, few_images):
    cfg = config(own)
    before = cfg.dump() if isinstance(cfg, CfgNode) else str(cfg)
    model = ssimkd.build_student(cfg)
    assert (cfg.dump() if isinstance(cfg, CfgNode) else str(cfg)) == before
    assert model.training and model.roi_heads.num_classes == len(CLASSES)
    assert len(DatasetCatalog.get("own_loop")) == 12
    given = torch.load(TEACHER, weights_only=True)["model"]
    inherited = [x for x in model.state_dict() if x.startswith("proposal_generator.rpn_head")]
    assert inherited
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in inherited)
    assert not [x for x in caplog.records if x.levelname == "WARNING" and "ssimkd" in x.name]
    for leave_out in (False, True):
        if leave_out:  # as pickle does; it is built again
            model.distiller.teacher = None
        with EventStorage():
            assert model(image_batch((96, 96)))["ssim_kd_loss"] > 0


def test_a_wrong_name_is_refused(own):
    cfg = yaml_config(own).clone()
    cfg.defrost()
    cfg.MODEL.DISTILL.INHERIT = ["no_such"]
    with pytest.raises(ConfigError, match="INHERIT: the student has no weights in 'no_such'"):
        ssimkd.build_student(cfg)
    cfg.MODEL.DISTILL.INHERIT = []
    cfg.MODEL.DISTILL.SKIP_NONFINITE_STEPS = 3
    with pytest.raises(ConfigError, match="SKIP_NONFINITE_STEPS: only the training loop of"):
        ssimkd.build_student(cfg)


def test_what_a_loop_of_ones_own_has_to_do_is_said(own, caplog):
    cfg = yaml_config(own).clone()
    cfg.defrost()
    cfg.DATALOADER.MAPPER, cfg.MODEL.DISTILL.WANDB_PROJECT = "my.mapper", "cracks"
    ssimkd.build_student(cfg)
    assert "DATALOADER.MAPPER and MODEL.DISTILL.WANDB_PROJECT: your own loader and" in caplog.text


def test_detectron2s_own_call_refuses_what_it_cannot_do(own):
    with pytest.raises(ConfigError, match=r"NUM_CLASSES_FROM_DATA .* ssimkd.build_student\(cfg\)"):
        build_model(yaml_config(own))


@pytest.mark.parametrize("key, value", [("INHERIT", ["no_such"]), ("SKIP_NONFINITE_STEPS", 3)])
def test_the_first_step_refuses_settings_of_the_driver(student, key, value):
    model = student(f"MODEL.DISTILL.{key}", value)
    with EventStorage(), pytest.raises(ConfigError, match=rf"{key}: .* ssimkd.build_student"):
        model(image_batch((96, 96)))
