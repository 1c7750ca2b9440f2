r"""Draws and lists the objects that a detector finds in images.

    ssimkd predict --config-file ssimkd_R50.yaml --weights output/model_final.pth \
        street.jpg park.jpg --output seen

writes the drawn images and predictions.json to the folder `seen`. Images are prepared as in an
evaluation of the config, and classes have the names of its test data. An entry of the list is

    {"file_name": "street.jpg", "category_name": "car", "category_id": 2, "score": 0.98,
     "bbox": [x, y, width, height]}

The box is in pixels, and category_id counts from 0. Masks and keypoints have COCO's format. An
image that cannot be read is left out. It is named at the end, and the exit status is then 1.
"""

import argparse
import json
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ssimkd.engine.arguments import load_config
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import (
    draw_detections,
    image_reader,
    load_detector,
    metadata_of,
    write_image,
)

from . import command_parser


class Predictions(NamedTuple):
    """The result for all images.

    Attributes:
        entries (list[dict]): the content of predictions.json.
        unread (list[str]): a line for each image that cannot be read.
        best_left_out (float): the highest score below the threshold, or 0.
    """

    entries: List[Dict[str, Any]]
    unread: List[str]
    best_left_out: float


def check_files(images: List[str], folder: str) -> None:
    """Raises ConfigError if a drawing in `folder` would overwrite an image or another drawing."""
    taken: Dict[str, str] = {}
    for path in images:
        drawing = os.path.join(folder, os.path.basename(path))
        there = os.path.isfile(path) and os.path.exists(drawing)
        if there and os.path.samefile(path, drawing):
            raise ConfigError(f"--output: {path} would be overwritten. Name another folder.")
        other = taken.setdefault(drawing, path)
        if other != path:
            raise ConfigError(
                f"--output: {other} and {path} have the same name. Draw them into two folders."
            )


def entries_of(path: str, detections: Instances, metadata: Metadata) -> List[Dict[str, Any]]:
    """The entries of one image in predictions.json."""
    names = metadata.get("thing_classes", None)
    entries = []
    for entry in instances_to_coco_json(detections, path):
        label = entry["category_id"]
        named = {"category_name": names[label] if names else str(label)}
        entries.append({"file_name": entry.pop("image_id"), **named, **entry})
    return entries


@torch.no_grad()
def predict(args: argparse.Namespace) -> Predictions:
    """Draws and lists the detections of all images that can be read."""
    check_files(args.images, args.output)
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
        entries += entries_of(path, found, metadata)
    return Predictions(entries, unread, best)


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    parser = command_parser("predict", __doc__)
    add = parser.add_argument
    add("images", nargs="+", help="image files")
    add("--weights", default="", help="path or URL of the checkpoint (the config's)")
    add("--output", required=True, help="folder for the drawings and predictions.json")
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="lowest score to draw and list (0.5)",
    )
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="overrides of the config, which come last",
    )
    args = parser.parse_args(words)
    if not 0 <= args.confidence_threshold <= 1:
        parser.error("--confidence-threshold must be from 0 to 1")
    setup_logger(name="ssimkd")
    found = predict(args)
    path = os.path.join(args.output, "predictions.json")
    with open(path, "w") as f:
        json.dump(found.entries, f, indent=1)
    if found.best_left_out and not found.entries:
        print(
            f"The best score is {found.best_left_out:.2g}, below --confidence-threshold "
            f"{args.confidence_threshold:g}"
        )
    drawn = len(args.images) - len(found.unread)
    print(f"{len(found.entries)} objects in {drawn} images: {path}")
    if found.unread:
        sys.exit("\n".join(f"error: {line}" for line in found.unread))
