"""The keys that this project adds to Detectron2's config, with their defaults.

The node of each loss, `MODEL.DISTILL.<NAME>`, is made from the constructor of its class: the
arguments in upper case. Their meaning and the sources of their defaults are written there, in
`losses/`.
"""

from detectron2.config import CfgNode as CN

from ssimkd.errors import ConfigError
from ssimkd.registry import KD_LOSS_REGISTRY, loss_defaults

# (node, key) of everything that is added to Detectron2's config
OWN_KEYS = (
    ("MODEL", "DISTILL"),
    ("MODEL", "TORCHVISION"),
    ("MODEL", "TIMM"),
    ("DATASETS", "COCO"),
    ("DATASETS", "NUM_CLASSES_FROM_DATA"),
    ("DATASETS", "UNLABELED"),
    ("SOLVER", "IMS_PER_BATCH_UNLABELED"),
    ("DATALOADER", "MAPPER"),
    ("DATALOADER", "SKIP_BAD_IMAGES"),
)


def check_has_keys(cfg: CN) -> None:
    """Raises ConfigError for a config without this project's keys."""
    if "DISTILL" not in cfg.MODEL:
        raise ConfigError("MODEL.DISTILL is missing: call ssimkd.add_ssimkd_config(cfg) first")


def add_ssimkd_config(cfg: CN) -> None:
    """Adds this project's keys, those of OWN_KEYS, to a Detectron2 config, in place.

    The comments say where a default comes from. [paper]: de Rijk et al., NeurIPS 2022, from
    secondary sources, because only its abstract was read. [authors]: the code of a loss's own
    authors. [shapes]: measured on the Shapes data by `benchmarks/compare.py`, see
    docs/comparison.md; [shapes: x]: by its option `--ablation x`.

    Raises:
        ConfigError: a registered loss has the name of another key of `MODEL.DISTILL`.
    """
    # Your own data sets in COCO's format, a list of {NAME, JSON, IMAGES}; without JSON it is a
    # folder of images for UNLABELED
    cfg.DATASETS.COCO = []
    # Data sets whose images come beside those of TRAIN in every step, for the distillation alone;
    # their annotations are ignored
    cfg.DATASETS.UNLABELED = ()
    # Images of UNLABELED in a step, in all processes together; 0: none
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 8
    # True: the heads get as many classes as the first data set of TRAIN has
    cfg.DATASETS.NUM_CLASSES_FROM_DATA = False

    # A mapper of your own, such as "my_package.MyMapper", in place of Detectron2's DatasetMapper
    cfg.DATALOADER.MAPPER = ""
    # True: an image that cannot be read is replaced by another one
    cfg.DATALOADER.SKIP_BAD_IMAGES = False

    cfg.MODEL.DISTILL = CN()

    cfg.MODEL.DISTILL.TEACHER = CN()
    # A name in Detectron2's zoo ("COCO-Detection/faster_rcnn_R_101_FPN_3x") or a file, .yaml or .py
    cfg.MODEL.DISTILL.TEACHER.CONFIG = ""
    # A file or URL, .pkl or .pth; "": the zoo's checkpoint of CONFIG
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = ""
    # Overrides of CONFIG: ["KEY", value, ...] for a .yaml, ["key=value", ...] for a .py
    cfg.MODEL.DISTILL.TEACHER.OPTS = []
    # Precision of the teacher's weights and arithmetic: "float32", "bfloat16", "float16"; "auto":
    # half precision where the student trains in it (SOLVER.AMP), float32 otherwise
    cfg.MODEL.DISTILL.TEACHER.PRECISION = "auto"
    # True: the teacher runs through torch.compile
    cfg.MODEL.DISTILL.TEACHER.COMPILE = False
    # Factor of all losses of this teacher
    cfg.MODEL.DISTILL.TEACHER.LOSS_WEIGHT = 1.0
    # Several teachers in place of TEACHER: a list of mappings with the keys of TEACHER, NAME
    # ("teacher1", ... by default) and, where teachers differ in them, IN_FEATURES, LEVEL_WEIGHTS,
    # ADAPTER, LOSSES and INHERIT. Other keys of TEACHER are defaults, except WEIGHTS and OPTS
    cfg.MODEL.DISTILL.TEACHERS = []

    # Levels of the student; each is compared with the teacher's level of the same stride. p2 and p3
    # contribute most, p6 nothing [shapes: levels]
    cfg.MODEL.DISTILL.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # Factor of each level in every loss, in the order of IN_FEATURES; []: 1, and no other factors
    # were better [shapes: level_weights]
    cfg.MODEL.DISTILL.LEVEL_WEIGHTS = []
    # "none", or "conv1x1": a convolution from the student's to the teacher's channels [paper: phi];
    # it costs accuracy where the channels are equal [shapes: adapter]
    cfg.MODEL.DISTILL.ADAPTER = "none"
    # True: cells that only pad an image to the size of its batch are left out of the losses; both
    # settings are equally good [shapes: padding]
    cfg.MODEL.DISTILL.MASK_PADDING = True
    # Names of the losses, see KD_LOSS_REGISTRY; (): the detector is trained without a teacher
    cfg.MODEL.DISTILL.LOSSES = ("ssim",)
    # Modules of the student that start from the teacher's weights: "neck" (the backbone without its
    # bottom-up part), "proposal_generator", "roi_heads", "head", or any other module
    cfg.MODEL.DISTILL.INHERIT = []
    # Images on which student and teacher are checked before the first iteration; 0: no check
    cfg.MODEL.DISTILL.CHECK_IMAGES = 8
    # Iterations from one log of the losses' gradients to the next; 0: they are not logged
    cfg.MODEL.DISTILL.LOG_GRADIENTS = 0
    # Number of steps with NaN or infinity that are skipped before training stops
    cfg.MODEL.DISTILL.SKIP_NONFINITE_STEPS = 0
    # Iterations in which the losses' weights grow linearly from 0; 0: full weight at once, which is
    # as good [shapes: warmup]
    cfg.MODEL.DISTILL.WARMUP_ITERS = 0
    # First iteration without distillation: the teacher is not run from here on; 0: there is none
    cfg.MODEL.DISTILL.STOP_ITER = 0
    # Iterations before STOP_ITER in which the weights fall linearly to 0; 0: full weight up to it
    cfg.MODEL.DISTILL.COOLDOWN_ITERS = 0
    # Project in Weights & Biases that receives the training log; "": none
    cfg.MODEL.DISTILL.WANDB_PROJECT = ""

    # The network of MODEL.BACKBONE.NAME "build_torchvision_fpn_backbone" or, for RetinaNet,
    # "build_retinanet_torchvision_fpn_backbone"; see modeling/backbones.py
    cfg.MODEL.TORCHVISION = CN()
    cfg.MODEL.TORCHVISION.NAME = ""  # such as "mobilenet_v2"
    # Used only if MODEL.WEIGHTS is "": "DEFAULT" (ImageNet's), a file, or "" (random)
    cfg.MODEL.TORCHVISION.WEIGHTS = "DEFAULT"
    # Type of the batch norms: "FrozenBN", "BN" or "SyncBN"
    cfg.MODEL.TORCHVISION.NORM = "FrozenBN"
    # The same for timm: "build_timm_fpn_backbone" and "build_retinanet_timm_fpn_backbone"
    cfg.MODEL.TIMM = cfg.MODEL.TORCHVISION.clone()

    for name, cls in KD_LOSS_REGISTRY:
        key = name.upper()
        if key in cfg.MODEL.DISTILL:
            raise ConfigError(f"MODEL.DISTILL.{key} exists already: rename the loss {name}")
        defaults = loss_defaults(cls)
        cfg.MODEL.DISTILL[key] = CN({option.upper(): value for option, value in defaults.items()})
