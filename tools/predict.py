#!/usr/bin/env python
r"""Detects objects in images: draws them and lists them.

    python tools/predict.py --config-file configs/ssimkd_R50.yaml \
        --weights output/ssimkd_R50/model_final.pth street.jpg park.jpg --output output/seen

writes the drawn images and predictions.json to output/seen. Images are prepared as in an
evaluation of the config, `.yaml` or `.py`, and classes named as in its test data. The student.yaml
that a YAML run exports names its weights. An entry of predictions.json is

    {"file_name": "street.jpg", "category_name": "car", "category_id": 2, "score": 0.98,
     "bbox": [x, y, width, height]}

in pixels; category_id counts from 0 in the order of the classes. Masks and keypoints are there, in
COCO's format, where the detector finds some.
"""

import argparse
import json
import os
from typing import Any, Dict, List

import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from ssimkd.checkpoint_file import trust_checkpoints
from ssimkd.cli import add_flags, load_config
from ssimkd.detector import (
    draw_detections,
    image_reader,
    load_detector,
    metadata_of,
    write_image,
)
from ssimkd.errors import ConfigError, exit_in_one_line
from tqdm import tqdm


def check_files(images: List[str], folder: str) -> None:
    """Raises ConfigError for an image that is not there, or whose drawing would overwrite a file.

    Args:
        images (list[str]): paths.
        folder (str): of the drawings, which have the images' names.
    """
    taken: Dict[str, str] = {}
    for path in images:
        if not os.path.isfile(path):
            raise ConfigError(f"there is no image {path}")
        drawing = os.path.join(folder, os.path.basename(path))
        if os.path.exists(drawing) and os.path.samefile(path, drawing):
            raise ConfigError(f"--output: {path} would be overwritten: name another folder")
        other = taken.setdefault(drawing, path)
        if other != path:
            raise ConfigError(f"--output: {other} and {path} have the same name: run them apart")


def listed(path: str, detections: Instances, metadata: Metadata) -> List[Dict[str, Any]]:
    """The entries of one image in predictions.json."""
    names = metadata.get("thing_classes", None)
    entries = []
    for entry in instances_to_coco_json(detections, path):
        label = entry["category_id"]
        named = {"category_name": names[label] if names else str(label)}
        entries.append({"file_name": entry.pop("image_id"), **named, **entry})
    return entries


@torch.no_grad()
def predict(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Draws the detections of all images; returns their list."""
    check_files(args.images, args.output)
    cfg = load_config(args.config_file, args.opts, splits=("TEST",))
    model, read, metadata = load_detector(cfg, args.weights), image_reader(cfg), metadata_of(cfg)
    os.makedirs(args.output, exist_ok=True)
    entries = []
    for path in tqdm(args.images, unit="img", disable=None):
        found = model([read(path)])[0]["instances"].to("cpu")
        found = found[found.scores >= args.confidence_threshold]
        drawing = draw_detections(path, found, metadata)
        write_image(os.path.join(args.output, os.path.basename(path)), drawing)
        entries += listed(path, found, metadata)
    return entries


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", "--config", required=True, help="config of the detector")
    parser.add_argument("--weights", default="", help="checkpoint, path or URL; or the config's")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--output", required=True, help="folder of the drawings and of the list")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="leave out what scores less"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")
    add_flags(parser)
    args = parser.parse_args()
    trust_checkpoints(args.trust_checkpoint)
    setup_logger(name="ssimkd")
    with exit_in_one_line(args.debug):
        entries = predict(args)
    path = os.path.join(args.output, "predictions.json")
    with open(path, "w") as f:
        json.dump(entries, f, indent=1)
    print(f"{len(entries)} objects in {len(args.images)} images: {path}")


if __name__ == "__main__":
    main()
