r"""Draws and lists the objects that a detector finds in images.

    ssimkd predict --config-file ssimkd_R50.yaml --weights output/model_final.pth \
        street.jpg park.jpg --output seen

writes the drawn images and predictions.json to the folder `seen`. Images are prepared as in an
evaluation of the config. The list is in the format of COCO's results, and an entry also has names:

    {"file_name": "street.jpg", "category_name": "car", "image_id": 397133, "category_id": 3,
     "bbox": [x, y, width, height], "score": 0.98}

The box is in pixels. Names and ids of classes are those of the annotation file of the test data, or
else of the training data; the checkpoint holds them. The image_id is that of the config's test
data, or the file's name if the image is not listed there. An image that cannot be read is left out,
and one whose format cannot be written is not drawn. Both are named at the end, and the exit status
is 1.
"""

import argparse
import json
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ssimkd.data.datasets import image_ids_of
from ssimkd.errors import ConfigError, exit_in_one_line
from ssimkd.evaluation.predictor import (
    draw_detections,
    image_reader,
    load_detector,
    metadata_of,
    write_image,
)

from . import begin, load_trained


class Predictions(NamedTuple):
    """The result for all images.

    Attributes:
        entries (list[dict]): the content of predictions.json.
        searched (int): number of images that were read.
        failed (list[str]): a line for each image that cannot be read, or not be drawn.
        best_left_out (float): the highest score below the threshold, or 0.
    """

    entries: List[Dict[str, Any]]
    searched: int
    failed: List[str]
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


def entries_of(
    path: str, image_id: Any, detections: Instances, categories: List[Dict[str, Any]]
) -> List[Dict[str, Any]]:
    """The entries of one image in predictions.json."""
    entries = []
    for entry in instances_to_coco_json(detections, image_id):
        label = entry["category_id"]
        known = categories[label] if categories else {"id": label, "name": str(label)}
        entry["category_id"] = known["id"]
        entries.append({"file_name": path, "category_name": known["name"], **entry})
    return entries


@torch.no_grad()
def predict(args: argparse.Namespace) -> Predictions:
    """Draws and lists the detections of all images that can be read."""
    check_files(args.images, args.output)
    cfg, weights, categories = load_trained(args, "TEST")
    model, read, ids = load_detector(cfg, weights), image_reader(cfg), image_ids_of(cfg)
    metadata = metadata_of(cfg, categories)
    os.makedirs(args.output, exist_ok=True)
    entries: List[Dict[str, Any]] = []
    searched, failed, best = 0, [], 0.0
    for path in tqdm(args.images, unit="img", disable=None):
        try:
            image = read(path)
        except ConfigError as error:
            failed.append(str(error))
            continue
        searched += 1
        found = model([image])[0]["instances"].to("cpu")
        shown = found.scores >= args.confidence_threshold
        best = max([best, *found.scores[~shown].tolist()])
        found = found[shown]
        drawing = draw_detections(path, found, metadata)
        try:
            write_image(os.path.join(args.output, os.path.basename(path)), drawing)
        except ConfigError as error:
            failed.append(str(error))
        image_id = ids.get(os.path.realpath(path), os.path.basename(path))
        entries += entries_of(path, image_id, found, categories)
    return Predictions(entries, searched, failed, best)


@exit_in_one_line()
def main(words: Optional[Sequence[str]] = None) -> None:
    """Runs the command with the arguments `words`, or with those of this process."""
    args = begin("predict", words)
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
    print(f"{len(found.entries)} objects in {found.searched} images: {path}")
    if found.failed:
        sys.exit("\n".join(f"error: {line}" for line in found.failed))
