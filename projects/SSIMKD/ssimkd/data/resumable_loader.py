"""A training stream that a resumed run continues exactly.

Detectron2's training loader does not remember how many images it has given. Here the order of the
images and their random augmentation depend on the seed and the position in the stream alone, not
on the number of workers. A resumed run therefore sees the same images, flips and sizes as a run
that was never interrupted.

As in Detectron2, k processes share one stream, and each takes every k-th image. Without grouping by
aspect ratio an iteration sees the same images for any number of processes. With it, each process
collects landscape and portrait images in groups of its own, so that the batches can differ.
"""

import logging
import math
import random
from collections import defaultdict
from itertools import chain, islice
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from ssimkd.errors import ConfigError
from ssimkd.utils.random_state import preserve_random_state

from .bad_images import BadImageError, NamingMapper

logger = logging.getLogger(__name__)
MAX_BAD_IN_A_ROW = 10  # With more unreadable images in a row the data or the disk is wrong.
LABELS = ("annotations", "sem_seg_file_name", "pan_seg_file_name", "segments_info")  # of a record
SKIPPED = "skipped"  # An item that replaces unreadable images has a line for each under this key.
# Detectron2's samplers keep in these attributes what they drew at random.
DRAWN = ("_seed", "_seed_subset", "_indexes_subset")
UNSUPPORTED = {  # argument of Detectron2's loader -> what to do in its place
    "seed": "the images depend on train.seed",
    "single_gpu_batch_size": "total_batch_size says how many images a step has",
}
Position = Tuple[int, int]  # position in this process's stream, index in the data set


class ResumableLoader:
    """Endless batches (list[dict]) of this process's share of the images, with a `state_dict`.

    Loading starts with the first batch, from the state at that moment. It does not change the
    process's random generators.

    Args:
        dataset (list[dict] or Dataset): records in Detectron2's format.
        mapper (callable): record -> item of a batch.
        sampler (Sampler or None): endless indices of this process. None is a TrainingSampler.
        total_batch_size (int): images per iteration in all processes together.
        aspect_ratio_grouping (bool): a batch holds landscape images or portrait images.
        num_workers (int): processes that load images.
        labels (bool): False: what a record says of its image's content is left out.
        skip_bad_images (bool): the next image of the data set, if possible with the same
            orientation, replaces one that cannot be read, for any number of processes and after a
            resume. More than ten bad images in a row, or bad images in half of the data set, are
            an error.
        options: further arguments of torch's DataLoader.

    Raises:
        ConfigError: the processes cannot share the batch equally, or images of unknown size cannot
            be grouped. While it loads: too many images cannot be read.
        BadImageError: while it loads, an image cannot be read.

    Attributes:
        skipped (set[str]): a line for each image that this process has skipped so far.
        unlabeled (ResumableLoader or None): another stream, whose batches are added to these.
    """

    def __init__(
        self,
        dataset,
        *,
        mapper: Callable[[Dict], Any],
        sampler: Optional[Sampler] = None,
        total_batch_size: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        labels: bool = True,
        skip_bad_images: bool = False,
        **options,
    ) -> None:
        self.landscape: Optional[List[bool]] = None
        if aspect_ratio_grouping:
            try:
                self.landscape = [record["width"] > record["height"] for record in dataset]
            except KeyError as error:
                raise ConfigError(
                    "set DATALOADER.ASPECT_RATIO_GROUPING (.yaml) or aspect_ratio_grouping (.py) "
                    f"to False: a record of the data set has no {error}"
                ) from error
        records = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        self.dataset: Any = records
        self.mapper = PicklableWrapper(NamingMapper(mapper if labels else Unlabeled(mapper)))
        self.skip_bad_images = skip_bad_images
        self.skipped: Set[str] = set()
        self.sampler: Any = TrainingSampler(len(records)) if sampler is None else sampler
        self.batch_size, left = divmod(total_batch_size, comm.get_world_size())
        if left or self.batch_size < 1:
            raise ConfigError(
                f"the batch of {total_batch_size} images cannot be shared by "
                f"{comm.get_world_size()} processes: change SOLVER.IMS_PER_BATCH"
                f"{'' if labels else '_UNLABELED'} (.yaml) or total_batch_size (.py)"
            )
        self.options = {"num_workers": num_workers, **torch_options(options, num_workers)}
        self.batches = 0  # given so far
        self.unlabeled: Optional[ResumableLoader] = None  # its images come after those of a batch

    def __iter__(self) -> Iterator[List[Dict]]:
        with preserve_random_state():
            positions: Any = self._positions()
            loader = iter(DataLoader(self._seeded(), batch_sampler=positions, **self.options))
        more = iter(self.unlabeled or ())
        while True:
            with preserve_random_state():
                batch = next(loader)
            for item in batch if isinstance(batch, list) else ():
                self._count_skipped(item)
            if self.unlabeled is not None:
                if not isinstance(batch, list):
                    raise ConfigError(
                        "dataloader.train.collate_fn: beside images without labels it must return "
                        f"a list of records, got {type(batch).__name__}"
                    )
                batch = [*batch, *next(more)]
            self.batches += 1
            yield batch

    def peek(self, images: int) -> List[List[Dict]]:
        """The next batches with at least so many images, without those of `unlabeled`.

        The stream does not move on.
        """
        count = math.ceil(images / self.batch_size)
        with preserve_random_state():
            dataset = self._seeded()
            return [[dataset[p] for p in batch] for batch in islice(self._positions(), count)]

    def _count_skipped(self, item: Any) -> None:
        """Removes from an item the list of images that it replaces, and warns once of each."""
        for line in item.pop(SKIPPED, ()) if isinstance(item, dict) else ():
            if line not in self.skipped:
                logger.warning("Skipped: %s", line)
                self.skipped.add(line)
        if 2 * len(self.skipped) > len(self.dataset):
            raise ConfigError(
                f"--skip-bad-images: more than half of the {len(self.dataset)} images of the data "
                f"set cannot be read; {min(self.skipped)}"
            )

    def _seeded(self) -> "SeededDataset":
        seed = getattr(self.sampler, "_seed", 0)
        return SeededDataset(self.dataset, self.mapper, seed, self.skip_bad_images, self.landscape)

    def _positions(self) -> Iterator[List[Position]]:
        """Batches of positions that have not been given yet."""
        batches = group_batches(self.sampler, self.batch_size, self.landscape)
        return islice(batches, self.batches, None)

    def state_dict(self) -> Dict[str, Any]:
        """What the sampler drew when it was built, and the number of batches given so far."""
        drawn = {name: vars(self.sampler)[name] for name in DRAWN if name in vars(self.sampler)}
        state = {"sampler": drawn, "batches": self.batches}
        if self.unlabeled is not None:
            state["unlabeled"] = self.unlabeled.state_dict()
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continues the stream at the state's position. To be called before the first batch."""
        vars(self.sampler).update(state["sampler"])
        self.batches = state["batches"]
        if self.unlabeled is not None:
            if "unlabeled" in state:
                self.unlabeled.load_state_dict(state["unlabeled"])
            else:
                logger.warning("The images without labels start anew: this resume is not exact")


def torch_options(options: Dict[str, Any], num_workers: int) -> Dict[str, Any]:
    """Those arguments of Detectron2's training loader that torch's DataLoader has.

    Raises:
        ConfigError: an argument cannot be followed.
    """
    for name, instead in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ConfigError(f"leave out {name}: {instead}")
    left_out = {*UNSUPPORTED, "drop_last"} | (set() if num_workers else {"prefetch_factor"})
    kept = {name: value for name, value in options.items() if name not in left_out}
    return {**kept, "collate_fn": kept.get("collate_fn") or trivial_batch_collator}


class Unlabeled:
    """Wraps a mapper (record -> item), which then sees no labels and gives none.

    A mapper of the user's own may give an image without annotations "instances" that are empty. The
    detector would take it for an image of the background.
    """

    def __init__(self, mapper: Callable[[Dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: Dict) -> Any:
        """Maps a record in Detectron2's format."""
        item = self.mapper({key: record[key] for key in record if key not in LABELS})
        if isinstance(item, dict):
            item.pop("instances", None)
        return item


class SeededDataset(Dataset):
    """A data set whose random augmentation depends on the seed and the position alone.

    An image for which the mapper returns None is replaced by the next one. Detectron2 draws another
    one at random.
    """

    def __init__(
        self,
        records: Any,
        mapper: Callable[[Dict], Any],
        seed: int,
        skip_bad_images: bool,
        landscape: Optional[List[bool]],
    ) -> None:
        self.records, self.mapper = records, mapper
        self.skip_bad_images, self.landscape = skip_bad_images, landscape
        self.seed = (seed % 2**64, 0)  # Detectron2's -1 means no seed.
        self.rank, self.processes = comm.get_rank(), comm.get_world_size()

    def __getitem__(self, where: Position) -> Any:
        position, index = where
        shared = position * self.processes + self.rank  # position in the stream of all processes
        words = np.random.SeedSequence((*self.seed, shared)).generate_state(3)
        bad: List[str] = []
        for candidate in self._candidates(index):
            random.seed(int(words[0]))
            np.random.seed(words[1])
            torch.manual_seed(int(words[2]))
            try:
                item = self.mapper(self.records[candidate])
            except BadImageError as error:
                if not self.skip_bad_images:
                    raise
                bad.append(str(error))
                if len(bad) > MAX_BAD_IN_A_ROW:
                    break
                continue
            if item is None:
                continue
            if bad:
                item[SKIPPED] = bad
            return item
        if not bad:
            raise ConfigError("the mapper of the training data returns None for every image")
        raise ConfigError(
            f"--skip-bad-images: {len(bad)} images in a row cannot be read, so that none replaces "
            f"them; {bad[0]}"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        """The index of an image, then those of the images that can replace it.

        Images of the same orientation come first.
        """
        order = [range(index, len(self.records)), range(index)]
        if self.landscape is None:
            return chain(*order)
        own = self.landscape[index]
        same = (i for i in chain(*order) if self.landscape[i] == own)
        return chain(same, (i for i in chain(*order) if self.landscape[i] != own))


def group_batches(
    sampler: Sampler, batch_size: int, landscape: Optional[List[bool]]
) -> Iterator[List[Position]]:
    """Batches of an endless sampler, in the order of Detectron2's AspectRatioGroupedDataset.

    `landscape` says of each image whether it is wider than high. With None nothing is grouped.
    """
    waiting: Dict[bool, List[Position]] = defaultdict(list)
    for position, index in enumerate(sampler):
        group = waiting[landscape[index] if landscape else False]
        group.append((position, index))
        if len(group) == batch_size:
            yield group[:]
            group.clear()
