#!/usr/bin/env python
"""Distils a small detector for data of your own, as a tutorial to read and to change.

    python tools/distil_your_own.py

Teacher, student and data are the embedded ones, so that it runs anywhere in a minute or two. With
your own in their places, and more iterations, it is all that is needed.
"""

import argparse
import os

import cv2
import ssimkd.engine
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, default_setup
from ssimkd.data.datasets import use_own_data
from ssimkd.engine.run_record import record_run
from ssimkd.engine.writers import quiet_terminal

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--data", default="datasets/ssimkd_shapes", help="folder of images and json")
parser.add_argument("--iterations", type=int, default=200)
parser.add_argument("--output", default="output/distil_your_own")
args = parser.parse_args()
if not os.path.isdir(args.data):
    DatasetCatalog.get("ssimkd_shapes_train")  # draws the embedded data

# 1. The student: any config of Detectron2, with the meta-architecture that distils it.
cfg = get_cfg()
ssimkd.add_ssimkd_config(cfg)
cfg.merge_from_file("configs/shapes/vanilla.yaml")
cfg.MODEL.META_ARCHITECTURE = "DistillRCNN"  # of "GeneralizedRCNN"

# 2. Your data, in COCO's format: a folder of images and a json, for training and for validation.
cfg.DATASETS.COCO = [
    {"NAME": f"own_{x}", "JSON": f"{args.data}/instances_{x}.json", "IMAGES": f"{args.data}/{x}"}
    for x in ("train", "val")
]
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_train",), ("own_val",)
cfg.DATASETS.NUM_CLASSES_FROM_DATA = True
use_own_data(cfg, ("TRAIN", "TEST"))
cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = args.iterations, ()
cfg.OUTPUT_DIR = args.output

# 3. The teacher: a config (yours, or a name of Detectron2's zoo) and a checkpoint.
cfg.MODEL.DISTILL.TEACHER.CONFIG = "configs/shapes/teacher.yaml"
cfg.MODEL.DISTILL.TEACHER.WEIGHTS = "configs/shapes/teacher.pth"
cfg.MODEL.DISTILL.IN_FEATURES = ["p2", "p3", "p4", "p5"]  # the student's levels that learn
cfg.MODEL.DISTILL.SSIM.WEIGHT = 16.0

# 4. Train, which evaluates at the end. tools/report.py makes a page of what the folder then has.
quiet_terminal(args.output, rank=0)  # log.txt has everything
default_setup(cfg, args)  # writes config.yaml
with record_run(args.output):
    results = ssimkd.engine.train(cfg, resume=False)
print(f"Box AP of the student: {results['bbox']['AP']:.1f}")

# 5. Predict, with nothing but Detectron2: what training left in student.pth and student.yaml.
plain = get_cfg()
plain.merge_from_file(f"{args.output}/student.yaml")
record = DatasetCatalog.get("own_val")[0]
found = DefaultPredictor(plain)(cv2.imread(record["file_name"]))["instances"]
names = MetadataCatalog.get("own_val").thing_classes
for label, score in zip(found.pred_classes.tolist()[:5], found.scores.tolist()):
    print(f"{names[label]} {score:.2f}")
