"""The training stream has Detectron2's order and continues exactly from any position."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from ssimkd import ConfigError
from ssimkd.data.resumable_loader import ResumableLoader, torch_options
from ssimkd.utils.random_state import get_random_state

RECORDS = [{"width": 10 + (7 * i) % 5, "height": 12, "index": i} for i in range(23)]


def mapper(record):
    """A record with every kind of random augmentation."""
    return {**record, "drawn": (random.random(), np.random.rand(), torch.rand(1).item())}


def loader(seed=3, **options):
    sampler = TrainingSampler(len(RECORDS), seed=seed)
    options = {"total_batch_size": 4, **options}
    return ResumableLoader(RECORDS, mapper=mapper, sampler=sampler, **options)


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def test_batches_are_those_of_detectron2():
    order = iter(TrainingSampler(len(RECORDS), seed=3))
    grouped = AspectRatioGroupedDataset((RECORDS[i] for i in order), 4)
    found = [[record["index"] for record in batch] for batch in take(loader(), 20)]
    assert found == [[record["index"] for record in batch] for batch in take(grouped, 20)]
    batches = take(loader(aspect_ratio_grouping=False), 3)
    expected = take(TrainingSampler(len(RECORDS), seed=3), 12)
    assert [record["index"] for batch in batches for record in batch] == expected


@pytest.mark.parametrize("taken, workers", [(1, 0), (5, 2), (13, 2)])
def test_a_resumed_stream_equals_one_without_interruption(taken, workers):
    expected = take(loader(), 16)
    first = loader()
    assert take(first, taken) == expected[:taken]
    second = loader(seed=99, num_workers=workers)  # its own seed gives way to the saved one
    second.load_state_dict(first.state_dict())
    assert take(second, 16 - taken) == expected[taken:]


def test_an_image_for_which_the_mapper_returns_none_is_replaced():
    def only_even(record):
        return mapper(record) if record["index"] % 2 == 0 else None

    def batches(workers):
        stream = ResumableLoader(
            RECORDS,
            mapper=only_even,
            sampler=TrainingSampler(len(RECORDS), seed=3),
            total_batch_size=4,
            num_workers=workers,
        )
        return take(stream, 6)

    found = batches(0)
    assert all(record["index"] % 2 == 0 for batch in found for record in batch)
    assert found == batches(2)
    none = ResumableLoader(RECORDS, mapper=lambda record: None, total_batch_size=4)
    with pytest.raises(ConfigError, match="returns None for every image"):
        take(none, 1)


def test_loading_does_not_change_the_random_generators():
    expected = get_random_state()
    stream = iter(loader())
    next(stream), next(stream)
    assert str(get_random_state()) == str(expected)


def test_an_iteration_sees_the_same_images_with_any_number_of_processes(monkeypatch, processes=2):
    expected = take(loader(aspect_ratio_grouping=False), 10)
    assert len({record["drawn"] for batch in expected for record in batch}) == 40
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        first = loader(aspect_ratio_grouping=False)
        share = take(first, 4)
        second = loader(seed=99, aspect_ratio_grouping=False)
        second.load_state_dict(first.state_dict())
        shares.append(share + take(second, 6))
    for iteration, batch in enumerate(expected):
        found = [record for share in shares for record in share[iteration]]
        assert sorted(found, key=str) == sorted(batch, key=str)  # with what was drawn for each


def test_images_of_unknown_size_are_not_grouped():
    with pytest.raises(ConfigError, match="set DATALOADER.ASPECT_RATIO_GROUPING.*no 'width'"):
        ResumableLoader([{"index": 0}], mapper=mapper, total_batch_size=1)


def test_the_state_has_all_that_a_sampler_drew():
    sampler = TrainingSampler(len(RECORDS), seed=3)
    sampler._indexes_subset = torch.tensor([1, 2])  # of RandomSubsetTrainingSampler
    first = ResumableLoader(RECORDS, mapper=mapper, sampler=sampler, total_batch_size=4)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.sampler._indexes_subset, torch.tensor([1, 2]))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH"):
        loader(total_batch_size=0)


def test_arguments_of_detectron2s_own_loader():
    options = {"seed": None, "drop_last": True, "prefetch_factor": 2, "collate_fn": None}
    assert torch_options({**options, "pin_memory": True}, num_workers=0) == {
        "pin_memory": True,
        "collate_fn": trivial_batch_collator,
    }
    assert torch_options(options, num_workers=1)["prefetch_factor"] == 2
    for name in ("seed", "single_gpu_batch_size"):
        with pytest.raises(ConfigError, match=f"leave out {name}: "):
            torch_options({name: 3}, num_workers=0)


def test_a_batch_of_an_own_collate_fn_stays_as_it_is():
    batch = next(iter(loader(collate_fn=lambda items: {"items": items})))
    assert [*batch] == ["items"]


def test_an_own_collate_fn_beside_images_without_labels_is_refused():
    stream = loader(collate_fn=lambda items: {"items": items})
    stream.unlabeled = loader(labels=False)
    with pytest.raises(ConfigError, match="collate_fn: .* must return a list of records, got dict"):
        next(iter(stream))
