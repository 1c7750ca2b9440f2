"""The configs of the repository: zoo values, twins, and YAML against LazyConfig."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, image_batch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from ssimkd import add_ssimkd_config
from ssimkd.cli import load_config
from ssimkd.compat import model_zoo

ALL = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml"))
LAZY = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py"))


def flat(cfg, prefix=""):
    """Every key of a config and its value, as a plain dict."""
    out = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def differences(a, b):
    a, b = flat(a), flat(b)
    return {key for key in {**a, **b} if a.get(key) != b.get(key)}


def zoo(name):
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return cfg


def test_the_base_is_the_zoos():
    expected = zoo("Base-RCNN-FPN.yaml")
    expected.MODEL.MASK_ON = False
    assert not differences(load_config("configs/Base-RCNN-FPN.yaml", []), expected)


def test_the_student_is_the_zoos_1x():
    changed = differences(
        load_config("configs/ssimkd_R50.yaml", []),
        zoo("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
    )
    assert changed == {
        "MODEL.META_ARCHITECTURE", "MODEL.DISTILL.TEACHER.CONFIG", "OUTPUT_DIR"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vanilla_R50", "l1kd_R50", "l2kd_R50"])
def test_a_twin_differs_in_its_loss_alone(name):
    twin = load_config(f"configs/{name}.yaml", [])
    changed = differences(twin, load_config("configs/ssimkd_R50.yaml", []))
    assert changed == {"MODEL.DISTILL.LOSSES", "OUTPUT_DIR"}


@pytest.mark.parametrize("path", LAZY)
def test_a_lazy_config_has_all_that_a_run_needs(path):
    cfg = load_config(path, [])
    assert set(cfg) >= {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    name = Path(path).stem
    assert cfg.train.output_dir == f"output/{name}"


@pytest.mark.parametrize("path", ALL + LAZY)
def test_a_config_opens_with_its_purpose(path):
    assert Path(path).read_text().startswith("# ")


def small(model):
    """Fewer proposals: the comparison stays exact and gets quick."""
    model.proposal_generator.pre_nms_topk = {True: 50, False: 50}
    return model.train()


@pytest.mark.parametrize("name", ["ssimkd_R50", "vanilla_R50", "l1kd_R50", "l2kd_R50"])
def test_yaml_and_lazy_agree(name, tmp_path_factory):
    """Same parameters, and same losses for the same seed."""
    teacher, weights = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", tmp_path_factory.getbasetemp()
    weights = weights / "teacher_R50.pth"
    if not weights.exists():
        torch.save({"model": build_model(cpu(zoo(teacher))).state_dict()}, weights)
    key = "MODEL.DISTILL.TEACHER"
    opts = ["MODEL.DEVICE", "cpu", f"{key}.CONFIG", teacher, f"{key}.WEIGHTS", str(weights)]
    lazy_opts = [
        f"model.distiller.teacher.{k}={v}" for k, v in (("config", teacher), ("weights", weights))
    ]
    torch.manual_seed(0)
    a = build_model(load_config(f"configs/{name}.yaml", opts))
    torch.manual_seed(0)
    b = instantiate(load_config(f"configs/{name}.py", lazy_opts).model)
    assert a.state_dict().keys() == b.state_dict().keys()
    b.load_state_dict(a.state_dict())
    losses = []
    for model in (a, b):
        torch.manual_seed(1)
        with EventStorage(0):
            losses.append(small(model)(image_batch((64, 64), (64, 96))))
    assert losses[0].keys() == losses[1].keys()
    for loss, value in losses[0].items():
        assert torch.equal(value, losses[1][loss]), loss


def cpu(cfg):
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_yaml_and_lazy_train_alike():
    cfg, lazy = load_config("configs/ssimkd_R50.yaml", []), load_config("configs/ssimkd_R50.py", [])
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.train.output_dir == cfg.OUTPUT_DIR
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    parameter = [torch.zeros(1, requires_grad=True)]
    schedule = build_lr_scheduler(cfg, torch.optim.SGD(parameter, cfg.SOLVER.BASE_LR))
    multiplier = instantiate(lazy.lr_multiplier)
    for iteration in (0, 500, 59_999, 60_001, 80_001, 89_999):
        where = iteration / cfg.SOLVER.MAX_ITER
        assert schedule._multiplier(where) == pytest.approx(multiplier(where))
    mapper = lazy.dataloader.train.mapper
    assert tuple(mapper.augmentations[0].short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN
    assert mapper.image_format == cfg.INPUT.FORMAT
