import pytest
from detectron2.config import get_cfg
from ssimkd import ConfigError, add_ssimkd_config
from ssimkd.losses import PKDLoss, SSIMLoss, build_loss
from ssimkd.utils.lazy_fields import naming_lazy_fields


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


def test_a_loss_that_is_built_without_a_node_names_itself():
    with pytest.raises(ConfigError, match=r"^MODEL\.DISTILL\.PKD: weight must be"):
        PKDLoss(weight=-1.0)
    message = r"^model\.distiller\.losses, ssim: exponents must not all be 0"
    with pytest.raises(ConfigError, match=message), naming_lazy_fields():
        SSIMLoss(exponents=(0.0, 0.0, 0.0))


def test_wrong_missing_and_unknown_settings_are_named():
    node = distill_node()
    node.SSIM.BORDER, node.L1.BORDER = "replicate", "zero"
    del node["L2"]
    for name, message in {
        "SSIM": r"MODEL\.DISTILL\.LOSSES: there is no loss 'SSIM'; there are .*l1, l2.*ssim",
        "ssim": r"MODEL\.DISTILL\.SSIM: border .*'replicate'",
        "l1": r"MODEL\.DISTILL\.L1: .*border",
        "l2": r"MODEL\.DISTILL\.L2 is missing: register the loss l2",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build_loss(name, node)
