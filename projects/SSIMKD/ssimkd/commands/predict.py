#!/usr/bin/env python
r"""Detects objects in images: draws them and lists them.

    python tools/predict.py --config-file configs/ssimkd_R50.yaml \
        --weights output/ssimkd_R50/model_final.pth street.jpg park.jpg --output output/seen

writes the drawn images and predictions.json to output/seen. Images are prepared as in an
evaluation of the config, `.yaml` or `.py`, and classes named as in its test data. The student.yaml
that a YAML run exports names its weights. Overrides of the config come last, after --opts. Images
that cannot be read are named and left out; the exit status is then 1. An entry of predictions.json
is

    {"file_name": "street.jpg", "category_name": "car", "category_id": 2, "score": 0.98,
     "bbox": [x, y, width, height]}

in pixels; category_id counts from 0 in the order of the classes. Masks and keypoints are there, in
COCO's format, where the detector finds some.
"""

import argparse
import json
import os
import sys
from typing import Any, Dict, List, NamedTuple

import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

import ssimkd  # noqa: F401 (first: it silences warnings of other packages)
from ssimkd.engine.arguments import add_flags, load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import (
    draw_detections,
    image_reader,
    load_detector,
    metadata_of,
    write_image,
)


def check_files(images: List[str], folder: str) -> None:
    """Raises ConfigError for an image whose drawing would overwrite a file.

    Args:
        images (list[str]): paths.
        folder (str): of the drawings, which have the images' names.
    """
    taken: Dict[str, str] = {}
    for path in images:
        drawing = os.path.join(folder, os.path.basename(path))
        there = os.path.isfile(path) and os.path.exists(drawing)
        if there and os.path.samefile(path, drawing):
            raise ConfigError(f"--output: {path} would be overwritten: name another folder")
        other = taken.setdefault(drawing, path)
        if other != path:
            raise ConfigError(f"--output: {other} and {path} have the same name: run them apart")


def check_student(path: str) -> None:
    """Raises ConfigError for the student.yaml of a lazy run, which is a model without its data."""
    if path.endswith((".yaml", ".yml")) and os.path.isfile(path):
        with open(path) as f:
            lazy = any(line.strip().startswith("_target_:") for line in f)
        if lazy:
            raise ConfigError(
                f"--config-file: {path} is of a LazyConfig and does not say how images are "
                "prepared: name the run's own .py, with --weights"
            )


class Seen(NamedTuple):
    """What came of the images.

    Attributes:
        entries (list[dict]): of predictions.json.
        unread (list[str]): a line for each image that cannot be read.
        best_left_out (float): the highest score below the threshold; 0 without any.
    """

    entries: List[Dict[str, Any]]
    unread: List[str]
    best_left_out: float


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
def predict(args: argparse.Namespace) -> Seen:
    """Draws and lists the detections of all images that can be read."""
    check_files(args.images, args.output)
    check_student(args.config_file)
    cfg = load_config(args.config_file, args.opts, splits=("TEST",))
    model, read, metadata = load_detector(cfg, args.weights), image_reader(cfg), metadata_of(cfg)
    os.makedirs(args.output, exist_ok=True)
    entries: List[Dict[str, Any]] = []
    unread, best = [], 0.0
    for path in tqdm(args.images, unit="img", disable=None):
        try:
            image = read(path)
        except ConfigError as error:
            unread.append(str(error))
            continue
        found = model([image])[0]["instances"].to("cpu")
        shown = found.scores >= args.confidence_threshold
        best = max([best, *found.scores[~shown].tolist()])
        found = found[shown]
        drawing = draw_detections(path, found, metadata)
        write_image(os.path.join(args.output, os.path.basename(path)), drawing)
        entries += listed(path, found, metadata)
    return Seen(entries, unread, best)


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
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="and, last, overrides of the config"
    )
    add_flags(parser)
    args = parser.parse_args()
    if not 0 <= args.confidence_threshold <= 1:
        parser.error("--confidence-threshold must be from 0 to 1")
    setup_logger(name="ssimkd")
    with exit_in_one_line(args.debug):
        seen = predict(args)
    path = os.path.join(args.output, "predictions.json")
    with open(path, "w") as f:
        json.dump(seen.entries, f, indent=1)
    if seen.best_left_out and not seen.entries:
        print(
            f"The best score is {seen.best_left_out:.2g}, below --confidence-threshold "
            f"{args.confidence_threshold:g}"
        )
    drawn = len(args.images) - len(seen.unread)
    print(f"{len(seen.entries)} objects in {drawn} images: {path}")
    if seen.unread:
        sys.exit("\n".join(f"error: {line}" for line in seen.unread))


if __name__ == "__main__":
    main()
