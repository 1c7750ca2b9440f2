import math

import pytest
from detectron2.config import CfgNode, get_cfg
from ssimkd import ConfigError, add_ssimkd_config
from ssimkd.losses import SSIMLoss, build_loss


def distill_node(*overrides):
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    cfg.merge_from_list([*overrides])
    return cfg.MODEL.DISTILL


def test_a_loss_gets_the_settings_of_its_node():
    key = "MODEL.DISTILL.SSIM"
    loss = build_loss("ssim", distill_node(f"{key}.WEIGHT", 0.25, f"{key}.WINDOW_SIZE", 5))
    assert type(loss) is SSIMLoss
    assert loss.weight == 0.25 and loss.options["window_size"] == 5


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("SSIM", [], r"MODEL\.DISTILL\.LOSSES: there is no loss 'SSIM'; there are .*l1, l2.*ssim"),
        ("ssim", ["SSIM.BORDER", "replicate"], r"MODEL\.DISTILL\.SSIM: border .*'replicate'"),
        ("l1", ["L1.WEIGHT", math.inf], r"MODEL\.DISTILL\.L1: weight .*inf"),
        ("fkd", ["FKD.POOL_SIZES", (8, 0)], r"MODEL\.DISTILL\.FKD: pool_sizes .*\(8, 0\)"),
    ],
)
def test_an_error_names_the_key_to_change(name, overrides, message):
    keys = [f"MODEL.DISTILL.{x}" if i % 2 == 0 else x for i, x in enumerate(overrides)]
    with pytest.raises(ConfigError, match=message):
        build_loss(name, distill_node(*keys))


def test_missing_and_unknown_settings_are_named():
    node = distill_node()
    node.L1.BORDER = "zero"
    with pytest.raises(ConfigError, match=r"MODEL\.DISTILL\.L1: .*border"):
        build_loss("l1", node)
    with pytest.raises(ConfigError, match=r"MODEL\.DISTILL\.L2 is missing: register the loss l2"):
        build_loss("l2", CfgNode({"L1": {"WEIGHT": 1.0}}))
