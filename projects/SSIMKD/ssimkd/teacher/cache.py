"""A teacher's maps on disk, so that images which come again cost a read.

A file holds the maps of one image in one batch; its name is a hash of all that they depend on: the
normalised, padded pixels that the teacher is given, its config, weights and precision. So
augmentation, padding and other teachers in the same folder need no care: what differs has another
name.

Maps are stored as 16-bit steps between the least and the largest value of each channel. A float16
has as many bits, but overflows, and spends them on values near 0 where a channel may have none.
"""

import hashlib
import json
import logging
import os
import re
import time
import uuid
from contextlib import suppress
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ssimkd.errors import ConfigError, one_line

logger = logging.getLogger(__name__)

STEPS = 2**16 - 1  # between a channel's least and largest value
SUFFIX = ".maps"
UNFINISHED = ".tmp"
DIGEST = 16  # bytes
HOUR = 3600  # seconds
GIB = 2**30  # bytes
FORMAT = 1  # changes with what a file means

Maps = Dict[str, Tensor]


class TeacherCache:
    """Answers for a teacher where it has seen an image before.

    New maps are rounded as well, so that it makes no difference whether an image was seen (but for
    the rounding of convolutions, which depends on how many images are run). Many processes may use
    a folder at once. What is interrupted or damaged is computed anew.

    Args:
        folder (str): made if need be.
        limit_gib (float): size of the folder from which nothing is added; each process may exceed
            it by 1/64 before it notices what the others have added.
        network (nn.Module): with the teacher's weights.
        settings (str): what else the maps depend on.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str, limit_gib: float, network: nn.Module, settings: str) -> None:
        self.folder = folder
        self.limit = limit_gib * GIB
        self.identity = identify(network, settings)
        self.storing = True
        self.entries = self.bytes = self.added = 0
        try:
            os.makedirs(folder, exist_ok=True)
            remove_unfinished(folder)
        except OSError as error:
            raise ConfigError(f"MODEL.DISTILL.TEACHER.CACHE: {one_line(error)}") from error
        logger.info("The teacher's maps are kept in %s", folder)

    def __call__(self, run: Callable[[Tensor], Maps], images: Tensor) -> Maps:
        """The maps of a batch, of which only the images that are new are run.

        Args:
            run (callable): images (N, 3, H, W) -> level -> (N, C, H', W'), of each image by itself.
            images (Tensor): (N, 3, H, W), normalised and padded.

        Returns:
            dict[str, Tensor]: level -> (N, C, H', W') in float32, where the images are.
        """
        paths = [self._path(image) for image in images.cpu()]
        read = {i: self._read(path) for i, path in enumerate(paths)}
        known = {i: maps for i, maps in read.items() if maps is not None}
        new = [i for i in read if i not in known]
        if new:
            fresh = run(images[new] if known else images)
            for row, i in enumerate(new):
                data = pack({level: maps[row] for level, maps in fresh.items()})
                known[i] = unpack(data)
                self._write(paths[i], data, known[i])
        return {
            level: torch.stack([known[i][level] for i in read]).to(images.device)
            for level in known[0]
        }

    def _path(self, image: Tensor) -> str:
        name = hashlib.blake2b(str(tuple(image.shape)).encode(), key=self.identity, digest_size=20)
        name.update(image.contiguous().numpy().data)
        return os.path.join(self.folder, name.hexdigest() + SUFFIX)

    def _read(self, path: str) -> Optional[Maps]:
        try:
            with open(path, "rb") as f:
                data = f.read()
        except OSError:
            return None
        if data[:DIGEST] != digest(data[DIGEST:]):
            logger.warning("%s is damaged and is computed anew", path)
            return None
        return unpack(data)

    def _write(self, path: str, data: bytes, maps: Maps) -> None:
        if not all(torch.isfinite(x).all() for x in maps.values()):
            return  # the run stops on it
        unfinished = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
        try:
            if not (self.storing and self._has_room(len(data))):
                return
            with open(unfinished, "wb") as f:
                f.write(data)
            os.replace(unfinished, path)  # whole or not at all
        except OSError as error:
            self._stop(one_line(error))
            with suppress(OSError):
                os.remove(unfinished)
            return
        self.bytes += len(data)
        self.added += 1

    def _has_room(self, size: int) -> bool:
        if self.added >= self.entries // 64:  # others may add, too
            sizes = [status.st_size for _, status in files_in(self.folder)]
            self.entries, self.bytes, self.added = len(sizes), sum(sizes), 0
        if self.bytes + size > self.limit:
            self._stop(f"it holds {self.bytes / GIB:.2f} GiB (MODEL.DISTILL.TEACHER.CACHE_GIB)")
        return self.storing

    def _stop(self, reason: str) -> None:
        self.storing = False
        logger.warning("No more of the teacher's maps go to %s: %s", self.folder, reason)


def identify(network: nn.Module, settings: str) -> bytes:
    """A hash of a network's weights and settings; addresses in memory do not count."""
    identity = hashlib.blake2b(f"{FORMAT}\n".encode(), digest_size=32)
    identity.update(re.sub(r" at 0x[0-9a-f]+", "", settings).encode())
    for name, value in network.state_dict().items():
        identity.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        identity.update(value.cpu().contiguous().numpy().data)
    return identity.digest()


def remove_unfinished(folder: str) -> None:
    """Removes what processes that were stopped have left; a younger file may be in work."""
    for path, status in files_in(folder):
        if path.endswith(UNFINISHED) and time.time() - status.st_mtime > HOUR:
            with suppress(FileNotFoundError):  # another process was faster
                os.remove(path)


def files_in(folder: str) -> List[Tuple[str, os.stat_result]]:
    """Path and status of each file, but for those that another process renames meanwhile."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            found.append((entry.path, entry.stat()))
    return found


def digest(data: bytes) -> bytes:
    """By which damage to a file is recognised."""
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def pack(maps: Maps) -> bytes:
    """One image's maps (C, H, W) as bytes: a digest of the rest, a line of shapes, the values."""
    shapes = {level: tuple(x.shape) for level, x in maps.items()}
    parts = [json.dumps(shapes).encode(), b"\n"]
    for x in maps.values():
        values = x.cpu().float().flatten(1).numpy()  # (C, H * W)
        low = values.min(1, keepdims=True)
        with np.errstate(all="ignore"):  # NaN and infinity come back as NaN
            step = (values.max(1, keepdims=True) - low) / STEPS
            steps = np.rint((values - low) / np.where(step > 0, step, 1)).clip(0, STEPS)
            parts += [low.tobytes(), step.tobytes(), steps.astype("<u2").tobytes()]
    data = b"".join(parts)
    return digest(data) + data


def unpack(data: bytes) -> Maps:
    """What :func:`pack` was given, each value to half a step."""
    line = data.index(b"\n", DIGEST)
    at = line + 1
    maps = {}
    for level, (channels, height, width) in json.loads(data[DIGEST:line]).items():
        low, step = np.frombuffer(data, "<f4", 2 * channels, at).reshape(2, channels, 1)
        at += 8 * channels
        steps = np.frombuffer(data, "<u2", channels * height * width, at)
        at += 2 * len(steps)
        with np.errstate(invalid="ignore"):
            values = steps.reshape(channels, -1) * step + low  # float32
        maps[level] = torch.from_numpy(values).view(channels, height, width)
    return maps
