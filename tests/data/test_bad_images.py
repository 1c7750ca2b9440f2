"""An image that cannot be read is named, or with --skip-bad-images replaced."""

import logging
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import shapes_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import SimpleTrainer
from PIL import Image
from ssimkd import ConfigError
from ssimkd.commands import train as train_net
from ssimkd.data.bad_images import BadImageError, NamingMapper
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.engine.yaml_driver import DistillTrainer

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def record(path):
    annotation = {"bbox": [4, 4, 20, 20], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    return dict(file_name=str(path), image_id=1, height=48, width=64, annotations=[annotation])


BROKEN = {  # what becomes of a good file -> the error that reading it causes
    "OSError": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "UnidentifiedImageError": lambda path: path.write_bytes(b""),
    "DecompressionBombError": lambda path: Image.new("1", (20000, 20000)).save(path),
    "FileNotFoundError": lambda path: path.unlink(),
    "SizeMismatchError": lambda path: Image.new("L", (64, 7)).save(path),
}


@pytest.mark.parametrize("error", BROKEN)
def test_an_image_that_cannot_be_read_is_named(tmp_path, error):
    path = tmp_path / "x.png"
    Image.fromarray(PIXELS).save(path)
    BROKEN[error](path)
    mapper = NamingMapper(DatasetMapper(shapes_cfg("vanilla"), True))
    with pytest.raises(BadImageError, match=f"^{path}: {error}: ") as raised:
        mapper(record(path))
    assert len(str(raised.value).splitlines()) == 1


# --skip-bad-images

BAD = {3, 4, 11}
RECORDS = [{"width": 10 + (7 * i) % 5, "height": 12, "file_name": f"{i}.jpg"} for i in range(23)]


def fragile(item):
    index = int(item["file_name"][: -len(".jpg")])
    if index in BAD:
        raise OSError("broken")
    return {**item, "drawn": np.random.rand() + torch.rand(1).item()}


def stream(**options):
    sampler = TrainingSampler(len(RECORDS), seed=3)
    options = {"total_batch_size": 4, "skip_bad_images": True, **options}
    return ResumableLoader(RECORDS, mapper=fragile, sampler=sampler, **options)


def take(loader, count):
    return list(islice(iter(loader), count))


def test_the_next_image_of_the_same_orientation_replaces_a_bad_one(caplog):
    loader = stream(aspect_ratio_grouping=False)
    names = [item["file_name"] for batch in take(loader, 10) for item in batch]
    replacement = {3: 5, 4: 5, 11: 12}
    order = islice(TrainingSampler(len(RECORDS), seed=3), 40)
    assert names == [f"{replacement.get(i, i)}.jpg" for i in order]
    assert loader.skipped == {f"{i}.jpg: OSError: broken" for i in BAD}
    warned = [r for r in caplog.records if r.name.startswith("ssimkd.data")]
    assert len(warned) == len(BAD)  # one warning for each
    grouped = [{item["width"] > item["height"] for item in batch} for batch in take(stream(), 20)]
    assert all(len(kinds) == 1 for kinds in grouped)


def test_without_another_image_of_its_orientation_any_image_replaces_a_bad_one():
    records = [{"width": 9, "height": 12, "file_name": "3.jpg"}, RECORDS[2], RECORDS[7]]
    assert all(record["width"] > record["height"] for record in records[1:])
    options = dict(sampler=[0, 1, 2], total_batch_size=1, skip_bad_images=True)
    first, *_ = take(ResumableLoader(records, mapper=fragile, **options), 3)
    assert first[0]["file_name"] == "2.jpg"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_skips_the_same_images(workers, taken=7):
    expected = take(stream(), 12)
    first = stream()
    take(first, taken)
    second = stream(num_workers=workers)
    second.load_state_dict(first.state_dict())
    assert take(second, 12 - taken) == expected[taken:]


def test_skipping_changes_no_other_image():
    """Positions, batches and random draws of all other images stay."""
    good = take(stream(), 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "BAD", set())
        whole = take(stream(), 12)
    for a, b in zip((x for batch in good for x in batch), (x for batch in whole for x in batch)):
        changed = int(b["file_name"][:-4]) in BAD
        assert (a["file_name"] != b["file_name"]) is changed and a["drawn"] == b["drawn"]


def of_names(names, mapper=fragile, **options):
    records = [{"width": 9, "height": 12, "file_name": name} for name in names]
    options.update(mapper=mapper, total_batch_size=1, skip_bad_images=True)
    return ResumableLoader(records, **options)


def test_too_many_bad_images_in_a_row_are_an_error():
    said = "11 images in a row cannot be read, .*; 3.jpg: OSError: broken"
    with pytest.raises(ConfigError, match=said):
        take(of_names(["3.jpg"] * 30 + ["1.jpg"] * 40, sampler=range(10)), 1)


def test_more_than_half_of_the_data_is_an_error(monkeypatch):
    monkeypatch.setitem(globals(), "BAD", {0, 2, 4, 5})
    names = [f"{i}.jpg" for i in range(8)]
    assert len(take(of_names(names, sampler=range(8)), 8)) == 8
    BAD.add(7)
    with pytest.raises(ConfigError, match="more than half of the 8 images"):
        take(of_names(names, sampler=range(8)), 8)


def test_an_own_mapper_may_say_that_an_image_is_bad():
    def fails(item):
        if item["file_name"] == "3.jpg":
            raise BadImageError("no second exposure")
        return dict(item)

    (batch,) = take(of_names(["3.jpg", "4.jpg", "5.jpg"], fails, sampler=range(3)), 1)
    assert [item["file_name"] for item in batch] == ["4.jpg"]


def test_a_bug_of_a_mapper_is_no_bad_image():
    with pytest.raises(KeyError, match="width"):
        NamingMapper(lambda item: item["width"])({"file_name": "a.jpg"})


@pytest.fixture
def own(tmp_path):
    """A data set of six images, of which the third cannot be read."""
    for i in range(6):
        Image.fromarray(PIXELS).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"")
    DatasetCatalog.register("bad_train", lambda: [record(tmp_path / f"{i}.png") for i in range(6)])
    yield "bad_train"
    DatasetCatalog.remove("bad_train")
    MetadataCatalog.remove("bad_train")


TINY = [
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()",
    "INPUT.MIN_SIZE_TRAIN", "(32,)", "DATALOADER.ASPECT_RATIO_GROUPING", "False",
]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--skip-bad-images"]])
def test_a_training_names_or_skips_a_bad_image(own, flags, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(SimpleTrainer, "run_step", lambda self: next(self._data_loader_iter))
    words = [
        "--config-file", "configs/shapes/vanilla.yaml", *flags, *TINY, "DATASETS.TRAIN",
        f"('{own}',)", "OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", "1",
    ]  # fmt: skip
    logging.getLogger("ssimkd").addHandler(caplog.handler)
    if flags:
        train_net.main(words)
        assert "1 images were skipped" in caplog.text and f"{tmp_path}/2.png: " in caplog.text
    else:
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}/2.png: Unidentified"):
            train_net.main(words)
    logging.getLogger("ssimkd").removeHandler(caplog.handler)


def test_an_evaluation_names_a_bad_image_and_skips_none(own):
    cfg = shapes_cfg("vanilla", "DATALOADER.SKIP_BAD_IMAGES", True)
    with pytest.raises(BadImageError, match="2.png: UnidentifiedImageError"):
        list(DistillTrainer.build_test_loader(cfg, own))
