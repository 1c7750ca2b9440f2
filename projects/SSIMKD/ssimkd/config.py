"""`cfg.MODEL.DISTILL`: every key, its default and where the default comes from.

The nodes of the losses hold the keyword arguments of their classes, in capitals. Two keys stand
under `cfg.DATASETS`, a user's own data, and one under `cfg.DATALOADER`.
"""

from detectron2.config import CfgNode as CN

# What is added to Detectron2's config: (node, key).
OWN_KEYS = (
    ("MODEL", "DISTILL"),
    ("DATASETS", "COCO"),
    ("DATASETS", "NUM_CLASSES_FROM_DATA"),
    ("DATALOADER", "SKIP_BAD_IMAGES"),
)


def add_ssimkd_config(cfg: CN) -> None:
    """Adds `MODEL.DISTILL` and three more keys to a Detectron2 config, in place.

    [paper]: de Rijk et al., NeurIPS 2022. [authors]: the code of the loss's own authors. [shapes]:
    measured here on the embedded data set, docs/comparison.md, by `benchmarks/compare.py`; [shapes: x]
    by its `--ablation x`.
    """
    # Your own data in COCO's format: a list of {NAME, JSON, IMAGES}; TRAIN and TEST then use NAME
    cfg.DATASETS.COCO = []
    # Set the heads' NUM_CLASSES to the number of classes in the first data set of TRAIN
    cfg.DATASETS.NUM_CLASSES_FROM_DATA = False

    # Train on another image in place of one that cannot be read (--skip-bad-images)
    cfg.DATALOADER.SKIP_BAD_IMAGES = False

    cfg.MODEL.DISTILL = CN()

    cfg.MODEL.DISTILL.TEACHER = CN()
    # Name in Detectron2's zoo ("COCO-Detection/faster_rcnn_R_101_FPN_3x") or path, .yaml or .py
    cfg.MODEL.DISTILL.TEACHER.CONFIG = ""
    # Path or URL (http(s)://, detectron2://), .pkl or .pth; "" is the zoo's checkpoint for CONFIG
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = ""
    # Overrides of CONFIG: ["KEY", value, ...] for .yaml, ["key=value", ...] for .py
    cfg.MODEL.DISTILL.TEACHER.OPTS = []
    # "float32" | "bfloat16" | "float16": of the teacher's weights and arithmetic. What this key and
    # the next ones save and cost: docs/performance.md
    cfg.MODEL.DISTILL.TEACHER.PRECISION = "float32"
    # Run the teacher through torch.compile; a CPU needs a C++ compiler for it
    cfg.MODEL.DISTILL.TEACHER.COMPILE = False
    # Factor of all losses of this teacher
    cfg.MODEL.DISTILL.TEACHER.LOSS_WEIGHT = 1.0
    # Several teachers at once, instead of TEACHER: a list of mappings with TEACHER's keys, NAME
    # ("teacher1", ... unless given) and, where they differ, IN_FEATURES, LEVEL_WEIGHTS, ADAPTER,
    # LOSSES, INHERIT. TEACHER's WEIGHTS and OPTS are not theirs, its other keys are their defaults
    cfg.MODEL.DISTILL.TEACHERS = []

    # Levels of the student; the teacher's level of equal stride answers. p2 and p3 carry most, p6
    # adds nothing [shapes: levels]
    cfg.MODEL.DISTILL.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # Factor of each level's part of every loss, in the order of IN_FEATURES; [] = 1, and no other
    # was better [shapes: level_weights]
    cfg.MODEL.DISTILL.LEVEL_WEIGHTS = []
    # "none" | "conv1x1": from the student's channels to the teacher's [paper: phi]; where they are
    # equal it costs [shapes: adapter]
    cfg.MODEL.DISTILL.ADAPTER = "none"
    # Leave out the cells that only pad an image to the size of its batch: they show nothing.
    # False is not told apart from it [shapes: padding]
    cfg.MODEL.DISTILL.MASK_PADDING = True
    # Names in KD_LOSS_REGISTRY; () trains the plain detector, without a teacher
    cfg.MODEL.DISTILL.LOSSES = ("ssim",)
    # Modules of the student that start from the teacher's weights: "neck" (the backbone less its
    # bottom-up part), "proposal_generator", "roi_heads", "head", or any other module's name
    cfg.MODEL.DISTILL.INHERIT = []
    # Training images on which teacher and student are checked before the first iteration; 0 = none
    cfg.MODEL.DISTILL.CHECK_IMAGES = 8
    # Iterations between logs of the losses' gradients at the maps against the detector's; 0 = none
    cfg.MODEL.DISTILL.LOG_GRADIENTS = 0
    # Steps with NaN or infinity in a loss or gradient that a run leaves out before it stops
    cfg.MODEL.DISTILL.SKIP_NONFINITE_STEPS = 0
    # Iterations over which all weights grow linearly from 0; 0 = none, and some were no better
    # [shapes: warmup]
    cfg.MODEL.DISTILL.WARMUP_ITERS = 0
    # Project in Weights & Biases that gets the run's figures and pictures; "" = none
    cfg.MODEL.DISTILL.WANDB_PROJECT = ""

    cfg.MODEL.DISTILL.SSIM = CN()
    # lambda [paper: 2 or 4; shapes: 64 and more, of clipped gradients]
    cfg.MODEL.DISTILL.SSIM.WEIGHT = 4.0
    # "minmax" [paper] | "teacher_range", as good | "standardize", "none", worse [shapes: normalize]
    cfg.MODEL.DISTILL.SSIM.NORMALIZE = "minmax"
    # "channel" | "image", as good | "batch", worse [shapes: scope]; the paper's is not known
    cfg.MODEL.DISTILL.SSIM.NORMALIZE_SCOPE = "channel"
    # "renormalize" | "reflect" | "valid" | "zero": not told apart [shapes: border]
    cfg.MODEL.DISTILL.SSIM.BORDER = "renormalize"
    # Cells; 3 to 15, and a SIGMA of 0.5 to 3, are not told apart [shapes: window, sigma]
    cfg.MODEL.DISTILL.SSIM.WINDOW_SIZE = 11  # [paper]
    cfg.MODEL.DISTILL.SSIM.SIGMA = 1.5  # [paper]
    cfg.MODEL.DISTILL.SSIM.K1 = 0.01  # [paper]
    cfg.MODEL.DISTILL.SSIM.K2 = 0.03  # [paper]
    # Of luminance, contrast, structure [paper]; the last carries the loss [shapes: components]
    cfg.MODEL.DISTILL.SSIM.EXPONENTS = (1.0, 1.0, 1.0)
    # Faster forms of the same loss: an analytic gradient on CPUs, Triton kernels on GPUs
    cfg.MODEL.DISTILL.SSIM.FAST = True
    # The one for CPUs in C++, built in a second at the start, where there is a C++ compiler
    cfg.MODEL.DISTILL.SSIM.COMPILE = True

    cfg.MODEL.DISTILL.L1 = CN()
    cfg.MODEL.DISTILL.L1.WEIGHT = 4.0  # as for SSIM [shapes: 256]
    cfg.MODEL.DISTILL.L1.NORMALIZE = "minmax"  # as for SSIM, or "none": raw features
    cfg.MODEL.DISTILL.L1.NORMALIZE_SCOPE = "channel"

    cfg.MODEL.DISTILL.L2 = CN()
    cfg.MODEL.DISTILL.L2.WEIGHT = 100.0  # the best of 6.25 to 400 [shapes]
    cfg.MODEL.DISTILL.L2.NORMALIZE = "minmax"
    cfg.MODEL.DISTILL.L2.NORMALIZE_SCOPE = "channel"

    cfg.MODEL.DISTILL.PKD = CN()
    cfg.MODEL.DISTILL.PKD.WEIGHT = 6.0  # Faster R-CNN, p2 to p5; 10 for RetinaNet [authors]

    cfg.MODEL.DISTILL.CWD = CN()
    # [MMRazor, on p2 to p6; the code that the authors link: 5, on p3 to p6 of RetinaNet]
    cfg.MODEL.DISTILL.CWD.WEIGHT = 10.0
    cfg.MODEL.DISTILL.CWD.TAU = 1.0  # temperature [authors]

    cfg.MODEL.DISTILL.DEFEAT = CN()
    cfg.MODEL.DISTILL.DEFEAT.WEIGHT = 1.0
    # [authors: VOC; their answer for COCO: 4 and 16, next to losses on backbone and head]
    cfg.MODEL.DISTILL.DEFEAT.FOREGROUND_WEIGHT = 3.0
    cfg.MODEL.DISTILL.DEFEAT.BACKGROUND_WEIGHT = 12.0

    cfg.MODEL.DISTILL.MS_SSIM = CN()
    cfg.MODEL.DISTILL.MS_SSIM.WEIGHT = 4.0  # as for SSIM, as all but the exponents
    cfg.MODEL.DISTILL.MS_SSIM.NORMALIZE = "minmax"
    cfg.MODEL.DISTILL.MS_SSIM.NORMALIZE_SCOPE = "channel"
    cfg.MODEL.DISTILL.MS_SSIM.BORDER = "renormalize"
    cfg.MODEL.DISTILL.MS_SSIM.WINDOW_SIZE = 11  # cells
    cfg.MODEL.DISTILL.MS_SSIM.SIGMA = 1.5  # cells
    cfg.MODEL.DISTILL.MS_SSIM.K1 = 0.01
    cfg.MODEL.DISTILL.MS_SSIM.K2 = 0.03
    # Of the scales, the finest first [Wang, Simoncelli, Bovik, 2003]
    cfg.MODEL.DISTILL.MS_SSIM.SCALE_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

    cfg.MODEL.DISTILL.ICD = CN()  # [icd]: Kang et al., NeurIPS 2021, and its authors' PyTorch code
    cfg.MODEL.DISTILL.ICD.WEIGHT = 3.0  # 3 for two-stage, 8 for one-stage detectors [icd]
    # Of the auxiliary loss, times WEIGHT: their product is 1 [icd]
    cfg.MODEL.DISTILL.ICD.AUX_WEIGHT = 1 / 3
    # Upper bound of the norm of the auxiliary loss's gradient; not tuned [icd: 0.01 with AdamW]
    cfg.MODEL.DISTILL.ICD.AUX_CLIP = 1.0
    cfg.MODEL.DISTILL.ICD.NUM_CLASSES = 80  # in the ground truth [icd: COCO's]
    cfg.MODEL.DISTILL.ICD.HEADS = 8  # [icd]; the channels must be a multiple of twice as many
    cfg.MODEL.DISTILL.ICD.FAKE_RATIO = 5.0  # fake instances per real one [icd]
    # Per image, real and fake; 100 with p2, 300 without [icd]. Memory grows with it
    cfg.MODEL.DISTILL.ICD.MAX_QUERIES = 100
    cfg.MODEL.DISTILL.ICD.JITTER = 0.3  # of centres, as a share of the box [icd]
    # First iterations in which only the loss's own parts learn [icd: 1000 of 90000]
    cfg.MODEL.DISTILL.ICD.DETACH_ITERS = 1000

    # Zhang & Ma, ICLR 2021. Defaults: the authors' code for two-stage detectors; behind "|" that
    # for one-stage detectors. The paper has other numbers, TEMPERATURE the other way round.
    cfg.MODEL.DISTILL.FKD = CN()
    cfg.MODEL.DISTILL.FKD.WEIGHT = 1.0  # of the whole
    cfg.MODEL.DISTILL.FKD.TEMPERATURE = 0.5  # of the attention | 0.1
    cfg.MODEL.DISTILL.FKD.FEATURE = 7e-5  # maps under attention | 4.2e-4
    cfg.MODEL.DISTILL.FKD.CHANNEL = 4e-3  # means over cells | 2.4e-2
    cfg.MODEL.DISTILL.FKD.SPATIAL = 4e-3  # means over channels | 2.4e-2
    cfg.MODEL.DISTILL.FKD.NON_LOCAL = 7e-5  # non-local blocks | 4.2e-4
    cfg.MODEL.DISTILL.FKD.CHANNEL_ATTENTION = False  # beside the spatial one | True, as the paper
    # Cells per side of the windows that the non-local blocks pool, in the order of IN_FEATURES
    # (finest first); the last one is for all further levels
    cfg.MODEL.DISTILL.FKD.POOL_SIZES = (8, 4, 2)

    # Yang et al., CVPR 2022. Defaults: the authors' configs for Faster and Mask R-CNN, on p2 to p5;
    # behind "|" RetinaNet, then FCOS and RepPoints
    cfg.MODEL.DISTILL.FGD = CN()
    cfg.MODEL.DISTILL.FGD.WEIGHT = 1.0  # of the whole
    cfg.MODEL.DISTILL.FGD.TEMPERATURE = 0.5  # of the attention | 0.5 | 0.8 and 0.5
    cfg.MODEL.DISTILL.FGD.FOREGROUND = 5e-5  # the paper's alpha | 1e-3 | 1.6e-3
    cfg.MODEL.DISTILL.FGD.BACKGROUND = 2.5e-5  # beta | 5e-4 | 8e-4
    cfg.MODEL.DISTILL.FGD.ATTENTION = 5e-5  # gamma | 5e-4 (1e-3 in the paper) | 8e-4
    cfg.MODEL.DISTILL.FGD.RELATION = 5e-7  # lambda | 5e-6 | 8e-6

    # Yang et al., ECCV 2022. Defaults: the authors' configs for Faster and Mask R-CNN, on p2 to p5;
    # behind "|" RetinaNet and RepPoints
    cfg.MODEL.DISTILL.MGD = CN()
    cfg.MODEL.DISTILL.MGD.WEIGHT = 1.0  # of the whole
    cfg.MODEL.DISTILL.MGD.GENERATION = 5e-7  # the paper's alpha | 2e-5
    cfg.MODEL.DISTILL.MGD.MASK_RATIO = 0.45  # share of the cells hidden, lambda | 0.65
