"""Maps that show, for each level, where a student's features differ from its teacher's.

    l, c, s      luminance, contrast and structure, the three factors of SSIM
    SSIM         as in the run's loss, with its exponents
    |S-T|        absolute difference of the normalised features S (student) and T (teacher)
    (S-T)^2      its square

Each is averaged over the channels of a level. The features are normalised as in the run's SSIM
loss. A run without that loss gets its defaults.
"""

from typing import Any, Dict, Iterator, Mapping, NamedTuple, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from ssimkd.losses.ssim import SSIMLoss
from ssimkd.modeling.paired_maps import paired_outputs
from ssimkd.modeling.several_teachers import distillers_of
from ssimkd.ssim import ssim_map
from ssimkd.ssim.normalize import normalize_maps

SIMILARITIES = {"l": (1.0, 0.0, 0.0), "c": (0.0, 1.0, 0.0), "s": (0.0, 0.0, 1.0)}  # exponents
DISTANCES = ("|S-T|", "(S-T)^2")
NAMES = (*SIMILARITIES, "SSIM", *DISTANCES)
COLOURS = "inferno"
TILE = 192  # pixels, width of one map in a picture
HEAD = 18  # pixels, height of the line of text above it


class Pair(NamedTuple):
    """The normalised maps of one image and level.

    Attributes:
        student, teacher (Tensor): (1, C, H, W), the cells that the image covers.
        stride (int): pixels per cell.
        options (dict): settings of :func:`ssimkd.ssim.ssim_map`.
    """

    student: Tensor
    teacher: Tensor
    stride: int
    options: Dict[str, Any]


def normalized_pairs(model: Any, x: Mapping[str, Any]) -> Iterator[Tuple[str, Pair]]:
    """The normalised maps of one image, by level, with the model in evaluation mode.

    Args:
        model (nn.Module): a student. A plain detector has no pairs.
        x (mapping): the model's input; "image" is (3, height, width) in [0, 255].

    Yields:
        (str, Pair): a level such as "p3", or "<teacher>/p3" with several teachers.
    """
    for name, distiller in distillers_of(model):
        if not distiller.enabled:
            continue
        losses = [loss for loss in distiller.losses.values() if type(loss) is SSIMLoss]
        loss = losses[0] if losses else SSIMLoss()
        batch = [dict(x)]
        student, teacher, *_ = paired_outputs(model, distiller, batch)
        context = distiller.context(batch)
        for level in student:
            maps = student[level], teacher[level]
            inside = context.inside(level, maps[0])
            maps = normalize_maps(*maps, loss.normalize, loss.normalize_scope, inside)
            height, width = context.cells(level, maps[0])[0]
            s, t = (m[..., :height, :width] for m in maps)
            yield f"{name}/{level}".lstrip("/"), Pair(s, t, context.strides[level], loss.options)


@torch.no_grad()
def cell_maps(pair: Pair) -> Dict[str, Tensor]:
    """The maps of NAMES before the mean over channels, (C, H, W) each.

    With border "valid" the cells at the edge are NaN, since no complete window covers them.
    """
    s, t, _, options = pair
    ret = {}
    for name, exponents in {**SIMILARITIES, "SSIM": options["exponents"]}.items():
        found = ssim_map(s, t, **{**options, "exponents": exponents})[0]
        down, across = ((a - b) // 2 for a, b in zip(s.shape[-2:], found.shape[-2:]))
        ret[name] = F.pad(found, (across, across, down, down), value=float("nan"))
    ret.update(zip(DISTANCES, ((s - t).abs()[0], ((s - t) ** 2)[0])))
    return ret


def similarity_maps(model: Any, x: Mapping[str, Any]) -> Dict[str, Dict[str, np.ndarray]]:
    """The maps of one image. The arguments are those of :func:`normalized_pairs`.

    Returns:
        dict: level -> name of NAMES -> (H, W) float32, for each pixel the value of its cell.
    """
    height, width = x["image"].shape[-2:]
    ret: Dict[str, Dict[str, np.ndarray]] = {}
    for level, pair in normalized_pairs(model, x):
        ret[level] = {}
        for name, cells in cell_maps(pair).items():
            pixels = cells.mean(dim=0).cpu().numpy().repeat(pair.stride, 0).repeat(pair.stride, 1)
            ret[level][name] = pixels[:height, :width]
    return ret


def scales(maps: Mapping[str, Mapping[str, np.ndarray]]) -> Dict[str, Tuple[float, float]]:
    """The values that get the first and the last colour, by name of a map.

    The first colour means equal. It stands for 1 in a similarity, whose last colour stands for 0
    and less, and for 0 in a distance, whose last colour stands for its maximum over all levels.
    """
    ret = dict.fromkeys(NAMES, (1.0, 0.0))
    for name in DISTANCES:
        ret[name] = (0.0, max(float(np.nanmax(m[name])) for m in maps.values()) or 1.0)
    return ret


def in_colour(values: np.ndarray, scale: Tuple[float, float]) -> np.ndarray:
    """Colours a map: dark cells are alike, bright cells differ, NaN is grey.

    Args:
        values (ndarray): (H, W).
        scale (float, float): values of the first and the last colour.

    Returns:
        ndarray: (H, W, 3) uint8, RGB.
    """
    first, last = scale
    share = np.clip(np.nan_to_num((values - first) / (last - first)), 0, 1)
    colour = 255 * colormaps[COLOURS](share)[..., :3]
    return np.where(np.isnan(values)[..., None], 128, colour).round().astype(np.uint8)


def render(maps: Mapping[str, Mapping[str, np.ndarray]], image: np.ndarray) -> np.ndarray:
    """One picture of all maps: a row per level, a column per name, and the image at the left.

    A bar below each column shows its colours and the values of the first and the last.

    Args:
        maps (mapping): from :func:`similarity_maps`.
        image (ndarray): (., ., 3) uint8, RGB, the image of these maps in any size.

    Returns:
        ndarray: (h, w, 3) uint8, RGB; each map is TILE pixels wide.
    """
    scale = scales(maps)
    rows = []
    height, width = next(iter(maps.values()))["SSIM"].shape
    left = tile(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), "image")
    for level, by_name in maps.items():
        shown = [tile(in_colour(m, scale[n]), f"{level} {n}") for n, m in by_name.items()]
        rows.append(np.hstack([left, *shown]))
        left = np.full_like(left, 255)
    share = np.linspace(0, 1, TILE - 4)[None].repeat(10, 0)
    bars = [
        tile(in_colour(share, (0, 1)), f"{n}: {a:.3g} to {b:.3g}") for n, (a, b) in scale.items()
    ]
    rows.append(np.hstack([np.full_like(bars[0], 255), *bars]))
    return np.vstack(rows)


def tile(image: np.ndarray, text: str) -> np.ndarray:
    """An image (H, W, 3), scaled to the width TILE with a white margin, below a line of text."""
    width = TILE - 4
    size = (width, max(1, round(image.shape[0] * width / image.shape[1])))
    kind = cv2.INTER_AREA if image.shape[1] > width else cv2.INTER_NEAREST
    small = cv2.resize(image, size, interpolation=kind)
    ret = cv2.copyMakeBorder(small, HEAD, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    cv2.putText(ret, text, (4, HEAD - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return ret
