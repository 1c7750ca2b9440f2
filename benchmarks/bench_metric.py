#!/usr/bin/env python
"""Times COCO's metric on detections drawn at random: pycocotools against other packages.

python benchmarks/bench_metric.py                                   # as many as COCO's validation
python benchmarks/bench_metric.py --images 500 --packages hotcoco
"""

import argparse
import importlib
import io
import json
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from ssimkd.utils.measure import positive

# package -> modules of COCO and of COCOeval, and the latter's name
PACKAGES = {
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
    "ultrafast_pycocotools": ("ultrafast_pycocotools", "ultrafast_pycocotools", "COCOeval"),
    "hotcoco": ("hotcoco", "hotcoco", "COCOeval"),
    "faster_coco_eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
}
OTHERS = list(PACKAGES)[1:]
CLASSES, DETECTIONS, OBJECTS = 80, 100, 7.3  # per image; objects: COCO's mean
SIZE = np.array([640, 480])  # pixels


def draw_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4): x, y, width, height in pixels; sides are log-normal."""
    sides = np.exp(rng.normal(4.2, 0.9, (count, 2))).clip(4, 400)
    return np.concatenate([rng.random((count, 2)) * (SIZE - sides), sides], 1)


def draw(images: int) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """Ground truth in COCO's format, and detections: four near each object, the rest anywhere."""
    rng = np.random.default_rng(0)
    objects: List[Dict[str, Any]] = []
    found: List[Dict[str, Any]] = []
    for image in range(1, images + 1):
        true = draw_boxes(rng, rng.poisson(OBJECTS))
        classes = rng.integers(1, CLASSES + 1, len(true))
        for box, category in zip(true.tolist(), classes.tolist()):
            one = {"image_id": image, "category_id": category, "bbox": box, "id": len(objects) + 1}
            objects.append({**one, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.01)})
        near = np.repeat(true, 4, 0)[:DETECTIONS]
        near = near + rng.normal(0, 0.15, near.shape) * np.tile(near[:, 2:], 2)
        boxes = np.concatenate([near, draw_boxes(rng, DETECTIONS - len(near))])
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        guesses = rng.integers(1, CLASSES + 1, DETECTIONS)
        guesses[: len(near)] = np.repeat(classes, 4)[:DETECTIONS]
        for box, category, score in zip(boxes.tolist(), guesses.tolist(), rng.random(DETECTIONS)):
            one = {"image_id": image, "category_id": category, "bbox": box}
            found.append({**one, "score": float(score)})
    truth = {
        "info": {},
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, images + 1)],
        "annotations": objects,
        "categories": [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
    }
    return truth, found


def measure(package: str, path: str, found: List[Dict[str, Any]]) -> Tuple[float, np.ndarray]:
    """Seconds of CPU time of a package from detections to metrics, and its precisions."""
    data, metric, name = PACKAGES[package]
    with redirect_stdout(io.StringIO()):
        truth = importlib.import_module(data).COCO(path)
        start = time.process_time()
        evaluation = getattr(importlib.import_module(metric), name)(
            truth, truth.loadRes(found), "bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return time.process_time() - start, np.asarray(evaluation.eval["precision"])


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=positive, default=5000)
    parser.add_argument("--packages", nargs="+", choices=OTHERS, default=OTHERS)
    args = parser.parse_args()
    truth, found = draw(args.images)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "truth.json")
        Path(path).write_text(json.dumps(truth))
        seconds, expected = measure("pycocotools", path, found)
        print(f"pycocotools: {seconds:.1f} s")
        for package in args.packages:
            try:
                seconds, precision = measure(package, path, found)
            except ImportError as error:
                print(f"absent: {package} ({error})")
                continue
            equal = "equal" if np.array_equal(precision, expected) else "not equal"
            print(f"{package}: {seconds:.1f} s, precisions {equal} in every bit")


if __name__ == "__main__":
    main()
