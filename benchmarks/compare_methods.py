"""The methods of compare.py: every registered loss, and variants of it."""

import math
from pathlib import Path
from typing import List, NamedTuple, Tuple

from detectron2.config import get_cfg
from ssimkd import ConfigError, add_ssimkd_config
from ssimkd.engine.arguments import load_config
from ssimkd.losses import build_loss

ROOT = Path(__file__).resolve().parents[1]
PLAIN, REFERENCE = "vanilla", "ssim"
HEADS = f"{REFERENCE}:*0"  # starts with the teacher's heads and distils nothing
# Each variant changes one key of MODEL.DISTILL, or multiplies the weight by a factor.
ABLATIONS = {
    "components": [
        f"SSIM.EXPONENTS={e}"
        for e in ("(1.0,0.0,0.0)", "(0.0,1.0,0.0)", "(0.0,0.0,1.0)", "(0.0,1.0,1.0)")
    ],
    "scope": [f"SSIM.NORMALIZE_SCOPE={scope}" for scope in ("image", "batch")],
    "normalize": [f"SSIM.NORMALIZE={n}" for n in ("teacher_range", "standardize", "none")],
    "window": [f"SSIM.WINDOW_SIZE={cells}" for cells in (3, 5, 7, 15)],
    "sigma": [f"SSIM.SIGMA={cells}" for cells in (0.5, 1.0, 3.0)],
    "border": [f"SSIM.BORDER={border}" for border in ("reflect", "valid", "zero")],
    "levels": [
        "IN_FEATURES=['p2','p3','p4','p5','p6']",
        "IN_FEATURES=['p3','p4','p5']",
        "IN_FEATURES=['p2','p3']",
        "IN_FEATURES=['p4','p5']",
    ],
    "level_weights": ["LEVEL_WEIGHTS=[1.0,0.5,0.25,0.125]", "LEVEL_WEIGHTS=[0.125,0.25,0.5,1.0]"],
    "adapter": ["ADAPTER=conv1x1"],
    "padding": ["MASK_PADDING=False"],
    "warmup": [f"WARMUP_ITERS={iterations}" for iterations in (100, 250)],
}


class Experiment(NamedTuple):
    """What --on names: two configs and their data.

    Attributes:
        vanilla, distilled (str): paths of the configs without and with a teacher.
        heads (tuple[str]): kinds of heads that the student has.
        search_train, search_test (tuple[str]): overrides for the runs that search the weights.
        test (tuple[str]): overrides for the runs of the table.
    """

    vanilla: str
    distilled: str
    heads: Tuple[str, ...] = ("rpn", "roi")
    search_train: Tuple[str, ...] = ()
    search_test: Tuple[str, ...] = ()
    test: Tuple[str, ...] = ()


SHAPES = Experiment(
    "configs/shapes/vanilla.yaml",
    "configs/shapes/compare.yaml",
    search_train=("DATASETS.TRAIN", "('ssimkd_shapes_search_train',)"),
    search_test=("DATASETS.TEST", "('ssimkd_shapes_search_val',)"),
)
EXPERIMENTS = {
    "shapes": SHAPES,
    "retinanet": SHAPES._replace(
        vanilla="configs/shapes/retinanet_vanilla.yaml",
        distilled="configs/shapes/retinanet_compare.yaml",
        heads=("dense",),
    ),
    "photos": Experiment(
        "configs/photos/vanilla.yaml",
        "configs/photos/ssimkd.yaml",
        search_test=("DATASETS.TEST", "('bccd_val',)"),
        test=("DATASETS.TEST", "('bccd_test','bccd_val_test')"),
    ),
}


class Method(NamedTuple):
    """The training of one row of the table.

    Attributes:
        name (str): its name on the command line and in the table.
        loss (str): a name in the registry, whose weight is searched; "" for the plain student.
        partner (str): a loss beside it, with the weight that its own search finds; "" for none.
        opts (tuple[str]): further overrides.
        factor (float): the searched weight is multiplied by it; vanilla's iterations are.
        searched_as (str): name of the method whose search gives the weight.
    """

    name: str
    loss: str = ""
    opts: Tuple[str, ...] = ()
    factor: float = 1.0
    searched_as: str = ""
    partner: str = ""


def parse_method(text: str, searched_as: str = "") -> Method:
    """Parses vanilla[:*FACTOR] or [PARTNER+]LOSS[:KEY=VALUE | :*FACTOR]...

    The keys are below MODEL.DISTILL.

    Raises:
        ConfigError: there is no such loss or setting.
    """
    names, *changes = text.split(":")
    if names == PLAIN and all(change.startswith("*") for change in changes):
        return Method(text, factor=math.prod(float(change[1:]) for change in changes))
    partner, _, loss = names.rpartition("+")
    opts: List[str] = []
    factor, kept = 1.0, [names]
    try:
        for change in changes:
            if change.startswith("*"):
                factor *= float(change[1:])
                continue
            key, _, value = change.partition("=")
            if key == f"{loss.upper()}.WEIGHT":
                raise ConfigError("the weight is searched; write :*FACTOR for a multiple of it")
            opts += [f"MODEL.DISTILL.{key}", value]
            kept.append(change)
        node = load_config(str(ROOT / EXPERIMENTS["shapes"].distilled), opts).MODEL.DISTILL
        for name in filter(None, (partner, loss)):
            build_loss(name, node)
    except ValueError as error:
        raise ConfigError(f"method {text}: {error}") from error
    return Method(text, loss, tuple(opts), factor, searched_as or ":".join(kept), partner)


def default_weight(loss: str) -> float:
    """The weight that a loss has by default. The configs of the Shapes data may have another."""
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    return float(cfg.MODEL.DISTILL[loss.upper()].WEIGHT)
