"""The Shapes data: textured shapes on cluttered backgrounds, drawn from a seed.

Images are 8-bit BGR arrays (H, W, 3), masks are 8-bit arrays (H, W), boxes are [x, y, w, h] in
pixels. On disk the set is COCO's, under `$DETECTRON2_DATASETS/ssimkd_shapes` (the variable's
default is `datasets`):

    <split>/000000.jpg             the images
    instances_<split>.json         boxes, masks and keypoints of the objects
    sem_seg_<split>/000000.png     index in STUFF of each pixel
    panoptic_<split>/000000.png    segment id of each pixel, as COCO's panoptic API encodes it
    panoptic_<split>.json          the segments
"""

import json
import logging
import os
import shutil
import tempfile
from typing import Dict, List, Tuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic

from .shapes_annotations import KEYPOINTS, DrawnObject, instances, segments

logger = logging.getLogger(__name__)

CLASSES = ("disk", "ring", "triangle", "cross")
STUFF = ("things", "background")  # of semantic segmentation, where all objects are one class
BACKGROUND = len(CLASSES) + 1  # its category id
SPLITS = {"train": 2000, "val": 400}  # images
SIZES = ((96, 96), (96, 128), (128, 96))  # (H, W). They differ, so that batches are padded.
FOLDER = "ssimkd_shapes"
BACKGROUND_CONTRAST, OBJECT_CONTRAST = 0.3, 0.5
FINEST = 4  # subpixel bits of OpenCV's drawing functions


def outline(name: str, radius: float) -> np.ndarray:
    """Corners of a triangle or cross around the origin, (K, 2), in pixels."""
    if name == "triangle":
        angle = 2 * np.pi * np.arange(3) / 3
        return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    arm = 0.35  # half the width of a beam, as a share of the radius
    beam_end = np.array([[arm, arm], [arm, 1.0], [-arm, 1.0]])
    quarter_turn = np.array([[0, -1], [1, 0]])
    ends = [beam_end @ np.linalg.matrix_power(quarter_turn, k).T for k in range(4)]
    return radius * np.concatenate(ends)


def draw_mask(
    rng: np.random.Generator, name: str, size: Tuple[int, int]
) -> Tuple[np.ndarray, Tuple[int, int]]:
    """One object of class `name` at a random place, size and rotation.

    Returns:
        (H, W) antialiased mask; x, y of the pixel at its centre, always inside the image.
    """
    height, width = size
    radius = np.exp(rng.uniform(np.log(9.0), np.log(30.0)))
    inset = 0.5 * radius
    center = rng.uniform([inset, inset], [width - inset, height - inset])
    mask = np.zeros(size, np.uint8)
    scale = 1 << FINEST
    if name in ("disk", "ring"):
        where = tuple(int(v) for v in np.rint(center * scale))
        cv2.circle(mask, where, int(radius * scale), 255, -1, cv2.LINE_AA, FINEST)
        if name == "ring":
            cv2.circle(mask, where, int(0.55 * radius * scale), 0, -1, cv2.LINE_AA, FINEST)
    else:
        turn = rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = outline(name, radius) @ rotation.T + center
        cv2.fillPoly(mask, [np.rint(points * scale).astype(np.int32)], 255, cv2.LINE_AA, FINEST)
    return mask, (round(center[0]), round(center[1]))


def draw_texture(rng: np.random.Generator, size: Tuple[int, int], contrast: float) -> np.ndarray:
    """A random texture, (H, W, 3) in [0, 255]: two colours mixed by waves, checks or blotches.

    `contrast` in [0, 1] bounds the distance of the second colour from the first.
    """
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 16)
    along = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    across = (y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period)
    kind = rng.integers(3)
    if kind == 0:
        mix = 0.5 + 0.5 * np.sin(along)
    elif kind == 1:
        mix = (np.sin(along) * np.sin(across) > 0).astype(np.float32)
    else:
        coarse = rng.random((height // 8 + 2, width // 8 + 2), dtype=np.float32)
        mix = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    first, second = rng.uniform(0, 255, (2, 3))
    return first + contrast * (second - first) * np.clip(mix, 0, 1)[:, :, None]


def draw_background(rng: np.random.Generator, size: Tuple[int, int]) -> np.ndarray:
    """A background without objects: a texture, patches of other textures, strokes."""
    height, width = size
    image = draw_texture(rng, size, BACKGROUND_CONTRAST)
    for _ in range(rng.integers(1, 4)):
        corners = rng.uniform(-40, [width + 40, height + 40], (rng.integers(4, 7), 2))
        patch = np.zeros(size, np.uint8)
        cv2.fillPoly(patch, [corners.astype(np.int32)], 255)
        image = blend(image, draw_texture(rng, size, BACKGROUND_CONTRAST), patch)
    for _ in range(rng.integers(0, 5)):
        start, end = rng.uniform(0, [width, height], (2, 2)).astype(int).tolist()
        colour = tuple(rng.uniform(0, 255, 3))
        cv2.line(image, tuple(start), tuple(end), colour, int(rng.integers(1, 4)))
    return image


def blend(image: np.ndarray, paint: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paints `paint` over `image` with the opacity `mask` / 255."""
    alpha = mask[:, :, None] / 255.0
    return image * (1 - alpha) + paint * alpha


def draw_image(seed: Tuple[int, ...]) -> Tuple[np.ndarray, np.ndarray, List[DrawnObject]]:
    """One image and its objects. The same seed draws the same image.

    Returns:
        (H, W, 3) uint8 image; (H, W) uint8 owner of each pixel, see shapes_annotations.py; objects.
    """
    rng = np.random.default_rng(seed)
    size = SIZES[rng.integers(len(SIZES))]
    image = draw_background(rng, size)
    owner = np.zeros(size, np.uint8)
    objects: List[DrawnObject] = []
    for _ in range(rng.integers(1, 7)):
        label = int(rng.integers(len(CLASSES)))
        mask, center = draw_mask(rng, CLASSES[label], size)
        inside = mask > 127
        if (inside & (owner > 0)).sum() > 0.2 * inside.sum():
            continue  # It would hide too much of other objects, whose annotations would be noise.
        image = blend(image, draw_texture(rng, size, OBJECT_CONTRAST), mask)
        box = list(cv2.boundingRect(inside.astype(np.uint8)))
        objects.append(DrawnObject(label, box, center))
        owner[inside] = len(objects)
    image += rng.normal(0, 5, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), owner, objects


def write_split(folder: str, split: str, count: int) -> None:
    """Draws `count` images of a split into `folder`, with their COCO annotations."""
    kinds = ("", "sem_seg_", "panoptic_")
    pictures, sem_seg, panoptic = (os.path.join(folder, kind + split) for kind in kinds)
    for path in (pictures, sem_seg, panoptic):
        os.makedirs(path)
    images: List[Dict] = []
    annotations: List[Dict] = []
    panoptics: List[Dict] = []
    for index in range(count):
        image, owner, objects = draw_image((list(SPLITS).index(split), index))
        jpg, png = f"{index:06d}.jpg", f"{index:06d}.png"
        cv2.imwrite(os.path.join(pictures, jpg), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        cv2.imwrite(os.path.join(sem_seg, png), (owner == 0).astype(np.uint8))
        empty = np.zeros_like(owner)
        ids = np.dstack([empty, empty, owner + 1])  # a segment's id is R + 256 G + 65536 B
        cv2.imwrite(os.path.join(panoptic, png), ids)
        height, width = image.shape[:2]
        images.append({"id": index, "file_name": jpg, "height": height, "width": width})
        for annotation in instances(owner, objects):
            annotations.append({"id": len(annotations) + 1, "image_id": index, **annotation})
        info = segments(owner, objects, BACKGROUND)
        panoptics.append({"image_id": index, "file_name": png, "segments_info": info})
    skeleton = [[1, k] for k in range(2, len(KEYPOINTS) + 1)]  # COCO counts from 1
    things = [
        {"id": i + 1, "name": name, "isthing": 1, "keypoints": KEYPOINTS, "skeleton": skeleton}
        for i, name in enumerate(CLASSES)
    ]
    stuff = [{"id": BACKGROUND, "name": STUFF[1], "isthing": 0}]
    for kind, entries, categories in (
        ("instances", annotations, things),
        ("panoptic", panoptics, things + stuff),
    ):
        content = {"images": images, "annotations": entries, "categories": categories}
        with open(os.path.join(folder, f"{kind}_{split}.json"), "w") as f:
            f.write(json.dumps(content))  # several times faster than json.dump


def ensure_shapes(root: str) -> None:
    """Draws the set into the folder `root` unless it exists. A failure leaves no incomplete set."""
    if os.path.isdir(root):
        return
    logger.info("Drawing the Shapes data into %s ...", root)
    parent = os.path.dirname(os.path.abspath(root))
    os.makedirs(parent, exist_ok=True)
    draft = tempfile.mkdtemp(dir=parent, prefix=f".{FOLDER}-")
    fresh = os.path.join(draft, FOLDER)
    try:
        for split, count in SPLITS.items():
            write_split(fresh, split, count)
        os.rename(fresh, root)
    except OSError:
        if not os.path.isdir(root):  # Otherwise another process has drawn it meanwhile.
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def register_shapes() -> None:
    """Registers `ssimkd_shapes_{train,val}` and `ssimkd_shapes_panoptic_{train,val}`.

    The latter also have semantic segmentation, in which all objects are one class, as the zoo's
    PanopticFPN needs it. The images are drawn when one of the data sets is first loaded.
    """
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), FOLDER)

    def load(name: str, panoptic: bool = False) -> List[Dict]:
        ensure_shapes(root)
        metadata = MetadataCatalog.get(name)
        records = load_coco_json(metadata.json_file, metadata.image_root, name)
        if not panoptic:
            return records
        return merge_to_panoptic(records, load_sem_seg(metadata.sem_seg_root, metadata.image_root))

    for split in SPLITS:
        detection, panoptic = f"{FOLDER}_{split}", f"{FOLDER}_panoptic_{split}"
        DatasetCatalog.register(detection, lambda name=detection: load(name))
        DatasetCatalog.register(panoptic, lambda name=panoptic: load(name, True))
        metadata = dict(
            json_file=os.path.join(root, f"instances_{split}.json"),
            image_root=os.path.join(root, split),
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
            keypoint_names=list(KEYPOINTS),
            keypoint_flip_map=[("left", "right")],
            keypoint_connection_rules=[("center", end, (0, 255, 0)) for end in KEYPOINTS[1:]],
        )
        MetadataCatalog.get(detection).set(evaluator_type="coco", **metadata)
        MetadataCatalog.get(panoptic).set(
            evaluator_type="coco_panoptic_seg",
            panoptic_root=os.path.join(root, f"panoptic_{split}"),
            panoptic_json=os.path.join(root, f"panoptic_{split}.json"),
            sem_seg_root=os.path.join(root, f"sem_seg_{split}"),
            stuff_classes=list(STUFF),
            # COCO's category ids. 0, "things", is not one of them.
            stuff_dataset_id_to_contiguous_id={0: 0, BACKGROUND: 1},
            ignore_label=255,
            **metadata,
        )


def register_search() -> None:
    """Registers `ssimkd_shapes_search_{train,val}`: the training images in two parts.

    The second part has every fifth image. Settings are chosen on it, so that the validation set
    stays unseen.
    """

    def load(held_out: bool) -> List[Dict]:
        records = DatasetCatalog.get(f"{FOLDER}_train")
        return [r for index, r in enumerate(records) if (index % 5 == 0) == held_out]

    for part in SPLITS:
        name = f"{FOLDER}_search_{part}"
        DatasetCatalog.register(name, lambda part=part: load(part == "val"))
        # Detectron2's evaluator writes a json_file itself if the metadata has none.
        MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=list(CLASSES))
