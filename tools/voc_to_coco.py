#!/usr/bin/env python
r"""Writes COCO json for a data set in Pascal VOC's format, which Detectron2 then reads.

    git clone https://github.com/Shenggan/BCCD_Dataset datasets/BCCD_Dataset
    python tools/voc_to_coco.py datasets/BCCD_Dataset/BCCD --classes RBC WBC Platelets \
        --splits train val test val+test

Each split gives one file beside the folders of the data set, such as train.json. A split is a file
of ImageSets/Main without its ending. `val+test` joins two splits (val_test.json). Boxes are clipped
to their image, and those without area are left out. The command prints how many it clipped and left
out. Objects that are marked as difficult become ordinary ones. Corners stay as they are written,
also where a data set counts pixels from 1, as Pascal VOC's own does.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence
from xml.etree import ElementTree


def image_names(folder: Path, split: str) -> List[str]:
    """Names of a split's images, without their ending."""
    lists = [folder / "ImageSets/Main" / f"{part}.txt" for part in split.split("+")]
    lines = [line.split() for path in lists for line in path.read_text().splitlines()]
    return list(dict.fromkeys(words[0] for words in lines if words))


def corners_of(item: ElementTree.Element) -> List[float]:
    """x0, y0, x1, y1 of an object in pixels."""
    return [float(item.findtext(f"bndbox/{c}", "")) for c in ("xmin", "ymin", "xmax", "ymax")]


def convert(folder: Path, names: Sequence[str], classes: Sequence[str]) -> Dict[str, Any]:
    """The images `names` of a data set as the content of a COCO json.

    Args:
        folder (Path): it holds Annotations, with one XML file for each image.
        classes (sequence[str]): their category ids are 1, 2, ... in this order.

    Raises:
        ValueError: an annotation is malformed or has a class that is not in `classes`.
    """
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    clipped = left_out = 0
    for image_id, name in enumerate(names, start=1):
        try:
            root = ElementTree.parse(folder / "Annotations" / f"{name}.xml").getroot()
            width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
            boxes = [(item.findtext("name", ""), corners_of(item)) for item in root.iter("object")]
        except (ValueError, ElementTree.ParseError) as error:
            raise ValueError(f"{name}.xml: {error}") from error
        file_name = root.findtext("filename", "")
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for label, corners in boxes:
            if label not in classes:
                raise ValueError(f"{name}.xml has the class {label!r}, which --classes lacks")
            inside = [
                min(max(value, 0.0), float(most))
                for value, most in zip(corners, (width, height, width, height))
            ]
            clipped += inside != corners
            x, y, w, h = *inside[:2], inside[2] - inside[0], inside[3] - inside[1]
            if w <= 0 or h <= 0:
                left_out += 1
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": classes.index(label) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    print(
        f"{len(images)} images, {len(annotations)} boxes; {clipped} clipped, {left_out} left out",
        file=sys.stderr,
    )
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="it holds Annotations and ImageSets/Main")
    parser.add_argument("--classes", nargs="+", required=True, help="in the order of their ids")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="see above")
    args = parser.parse_args()
    for split in args.splits:
        try:
            data = convert(args.folder, image_names(args.folder, split), args.classes)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {split}: {error}")
        path = args.folder / f"{split.replace('+', '_')}.json"
        path.write_text(json.dumps(data))
        print(path)


if __name__ == "__main__":
    main()
