"""`cfg.MODEL.DISTILL`: every key, its default and where the default comes from.

The nodes of the losses hold the keyword arguments of their classes, in capitals.
"""

from detectron2.config import CfgNode as CN


def add_ssimkd_config(cfg: CN) -> None:
    """Adds `MODEL.DISTILL` to a Detectron2 config, in place.

    [paper]: de Rijk et al., NeurIPS 2022. [shapes]: measured here on the embedded data set, see
    projects/SSIMKD/README.md.
    """
    cfg.MODEL.DISTILL = CN()

    cfg.MODEL.DISTILL.TEACHER = CN()
    # Name in Detectron2's zoo ("COCO-Detection/faster_rcnn_R_101_FPN_3x") or path, .yaml or .py
    cfg.MODEL.DISTILL.TEACHER.CONFIG = ""
    # Path or URL (http(s)://, detectron2://), .pkl or .pth; "" is the zoo's checkpoint for CONFIG
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = ""
    # Overrides of CONFIG: ["KEY", value, ...] for .yaml, ["key=value", ...] for .py
    cfg.MODEL.DISTILL.TEACHER.OPTS = []

    # Levels of the student; the teacher's level of equal stride answers
    cfg.MODEL.DISTILL.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # "none" | "conv1x1": from the student's channels to the teacher's [paper: phi]
    cfg.MODEL.DISTILL.ADAPTER = "none"
    # Leave out the cells that only pad an image to the size of its batch [shapes]
    cfg.MODEL.DISTILL.MASK_PADDING = True
    # Names in KD_LOSS_REGISTRY; () trains the plain detector, without a teacher
    cfg.MODEL.DISTILL.LOSSES = ("ssim",)
    # Iterations over which all weights grow linearly from 0; 0 = none
    cfg.MODEL.DISTILL.WARMUP_ITERS = 0

    cfg.MODEL.DISTILL.SSIM = CN()
    cfg.MODEL.DISTILL.SSIM.WEIGHT = 4.0  # lambda [paper: 2 or 4]
    # "minmax" [paper] | "teacher_range" | "standardize" | "none"
    cfg.MODEL.DISTILL.SSIM.NORMALIZE = "minmax"
    # "channel" | "image" | "batch"; the first two are level [shapes], the paper's is not known
    cfg.MODEL.DISTILL.SSIM.NORMALIZE_SCOPE = "channel"
    # "renormalize" | "reflect" | "valid" | "zero" (level with the first [shapes])
    cfg.MODEL.DISTILL.SSIM.BORDER = "renormalize"
    cfg.MODEL.DISTILL.SSIM.WINDOW_SIZE = 11  # cells [paper]
    cfg.MODEL.DISTILL.SSIM.SIGMA = 1.5  # cells [paper]
    cfg.MODEL.DISTILL.SSIM.K1 = 0.01  # [paper]
    cfg.MODEL.DISTILL.SSIM.K2 = 0.03  # [paper]
    cfg.MODEL.DISTILL.SSIM.EXPONENTS = (1.0, 1.0, 1.0)  # of luminance, contrast, structure [paper]

    cfg.MODEL.DISTILL.L1 = CN()
    cfg.MODEL.DISTILL.L1.WEIGHT = 4.0  # as for SSIM; not tuned
    cfg.MODEL.DISTILL.L1.NORMALIZE = "minmax"  # as for SSIM, or "none": raw features
    cfg.MODEL.DISTILL.L1.NORMALIZE_SCOPE = "channel"

    cfg.MODEL.DISTILL.L2 = CN()
    cfg.MODEL.DISTILL.L2.WEIGHT = 100.0  # not tuned
    cfg.MODEL.DISTILL.L2.NORMALIZE = "minmax"
    cfg.MODEL.DISTILL.L2.NORMALIZE_SCOPE = "channel"

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
