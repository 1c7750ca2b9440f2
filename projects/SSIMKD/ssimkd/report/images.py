"""Images of the report: detections side by side, maps of similarity, where they differ most."""

import base64
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from ssimkd.evaluation.similarity import NAMES, in_colour, scales, tile

from .model_cost import Detector

SHOWN_SCORE = 0.3  # detections below it are not drawn
LEAST_WIDTH = 640  # pixels: smaller images are enlarged before anything is drawn on them
TEXT = 0.7  # of OpenCV's font: 15 pixels high, some 8 where the page shows 640 pixels as 350
README_WIDTH = 280  # pixels, of a picture beside others
MOST_WIDTH = 640  # pixels, of a picture in the page
PALETTE = ((59, 130, 246), (245, 158, 11), (16, 185, 129), (236, 72, 153), (139, 92, 246))
Picture = np.ndarray  # (H, W, 3) uint8, RGB


def draw_boxes(
    image: Picture, boxes: np.ndarray, classes: Sequence[int], texts: List[str]
) -> Picture:
    """An image with boxes; a class has its colour.

    Args:
        image (np.ndarray): (H, W, 3) uint8, RGB.
        boxes (np.ndarray): (K, 4), x0, y0, x1, y1 in its pixels.
        classes (sequence[int]): of each box.
        texts (list[str]): beside each box.
    """
    zoom = max(1, -(-LEAST_WIDTH // image.shape[1]))
    canvas = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    for box, category, text in zip(boxes, classes, texts):
        x0, y0, x1, y1 = (int(v * zoom) for v in box)
        colour = PALETTE[category % len(PALETTE)]
        cv2.rectangle(canvas, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, TEXT, 1)
        x = min(max(x0, 0), canvas.shape[1] - width - 4)
        y = max(y0, height + 6)
        cv2.rectangle(canvas, (x, y - height - 6), (x + width + 4, y), colour, -1)
        place = (x + 2, y - 4)
        cv2.putText(
            canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, TEXT, (255, 255, 255), 1, cv2.LINE_AA
        )
    return canvas


def draw_truth(record: Mapping[str, Any], dataset: str) -> Picture:
    """An image of a data set with its objects."""
    names = MetadataCatalog.get(dataset).get("thing_classes", ())
    objects = [o for o in record.get("annotations", ()) if not o.get("iscrowd", 0)]
    boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    classes = [o["category_id"] for o in objects]
    image = read_image(record["file_name"], "RGB")
    return draw_boxes(image, np.array(boxes), classes, [name_of(names, c) for c in classes])


def draw_detections(
    record: Mapping[str, Any], x: Dict[str, Any], detector: Detector, dataset: str, shown: str
) -> Picture:
    """The same image with what a detector finds in it, from a score of SHOWN_SCORE on."""
    names = MetadataCatalog.get(dataset).get("thing_classes", ())
    found = detector.detect(x, shown)
    found = found[found.scores >= SHOWN_SCORE]
    classes = found.pred_classes.tolist()
    texts = [f"{name_of(names, c)} {s:.2f}" for c, s in zip(classes, found.scores.tolist())]
    image = read_image(record["file_name"], "RGB")
    return draw_boxes(image, found.pred_boxes.tensor.numpy(), classes, texts)


def name_of(names: Sequence[str], category: int) -> str:
    """A class's name, or its number where the data set has none for it."""
    return names[category] if category < len(names) else str(category)


def draw_maps(
    maps: Mapping[str, Mapping[str, np.ndarray]],
) -> Tuple[Dict[str, Dict[str, Picture]], Dict[str, Tuple[float, float]]]:
    """Every map in colour: level -> name -> picture; and the scales of their colours."""
    scale = scales(maps)
    drawn = {
        level: {name: in_colour(by_name[name], scale[name]) for name in NAMES}
        for level, by_name in maps.items()
    }
    return drawn, scale


def most_different(maps: Mapping[str, Mapping[str, np.ndarray]]) -> Tuple[np.ndarray, int, int]:
    """1 - SSIM, the mean over the levels, (H, W), and row and column of its largest value."""
    different = 1 - np.nanmean([by_name["SSIM"] for by_name in maps.values()], axis=0)
    row, column = np.unravel_index(np.nanargmax(different), different.shape)
    return different, int(row), int(column)


def draw_most_different(maps: Mapping[str, Mapping[str, np.ndarray]], most: float) -> Picture:
    """The map of :func:`most_different`, up to the value `most`, its largest value in a ring."""
    different, row, column = most_different(maps)
    canvas = in_colour(different, (0.0, most or 1.0))
    zoom = max(1, -(-LEAST_WIDTH // canvas.shape[1]))
    canvas = cv2.resize(canvas, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    place = (int((column + 0.5) * zoom), int((row + 0.5) * zoom))
    cv2.circle(canvas, place, canvas.shape[1] // 12, (34, 211, 238), 2, cv2.LINE_AA)
    return canvas


def side_by_side(pictures: Mapping[str, Picture]) -> Picture:
    """Pictures in a row, each under its name."""
    tiles = [tile(picture, name, README_WIDTH) for name, picture in pictures.items()]
    height = max(t.shape[0] for t in tiles)
    return np.hstack(
        [np.pad(t, ((0, height - t.shape[0]), (0, 0), (0, 0)), constant_values=255) for t in tiles]
    )


def data_url(picture: Picture) -> str:
    """A picture as the address of an <img>: PNG, or JPEG where it is large."""
    if picture.shape[1] > MOST_WIDTH:
        size = (MOST_WIDTH, round(picture.shape[0] * MOST_WIDTH / picture.shape[1]))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    kind = "jpeg" if picture.shape[1] >= LEAST_WIDTH else "png"
    _, encoded = cv2.imencode(f".{kind}", picture[..., ::-1])
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
