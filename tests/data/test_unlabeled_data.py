"""Images without labels: folders, parts of data sets, and their stream beside the labelled one."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shapes_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import TrainingSampler
from omegaconf import OmegaConf
from PIL import Image
from ssimkd import ConfigError
from ssimkd.data.datasets import check_datasets, use_own_data
from ssimkd.data.image_folder import list_images
from ssimkd.data.resumable_loader import ResumableLoader
from ssimkd.engine import lazy_driver
from ssimkd.engine.yaml_driver import DistillTrainer
from ssimkd.utils.config_files import load_config


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, one of which is turned by its EXIF tag, and a broken one."""
    (tmp_path / "more").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    pixels.save(tmp_path / "b.jpg")
    pixels.save(tmp_path / "a.JPG", exif=turned)
    pixels.save(tmp_path / "more" / "c.png")
    (tmp_path / "d.jpeg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_a_data_set(folder):
    records = list_images(str(folder))
    assert [x["image_id"] for x in records] == ["a.JPG", "b.jpg", "d.jpeg", "more/c.png"]
    for x in records:
        if x["image_id"] == "d.jpeg":
            assert x["height"] == x["width"] == 0
        else:
            assert read_image(x["file_name"]).shape[:2] == (x["height"], x["width"])
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no image"):
        list_images(str(folder / "empty"))


@pytest.mark.parametrize("damaged", [b"Exif\0\0garbage", b"Exif\0\0"])
def test_damaged_exif_data_is_ignored_as_by_detectron2(tmp_path, damaged):
    pixels = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    pixels.save(tmp_path / "a.jpg", exif=damaged)
    (record,) = list_images(str(tmp_path))
    assert read_image(record["file_name"]).shape[:2] == (record["height"], record["width"])


@pytest.mark.parametrize("lazy", [False, True])
def test_an_entry_without_json_is_a_folder(folder, lazy):
    if lazy:
        coco = [{"name": "heap", "images": str(folder)}]
        names = {"unlabeled": {"dataset": {"names": "heap"}}}
        cfg = OmegaConf.create({"datasets": {"coco": coco}, "dataloader": names})
    else:
        cfg = shapes_cfg("ssimkd", "DATASETS.UNLABELED", ("heap",))
        cfg.DATASETS.COCO = [{"NAME": "heap", "IMAGES": str(folder)}]
    use_own_data(cfg, ("TRAIN", "UNLABELED"))
    use_own_data(cfg, ("TRAIN", "UNLABELED"))  # the second call changes nothing
    assert len(DatasetCatalog.get("heap")) == 4
    check_datasets(["heap"], "DATASETS.UNLABELED")
    if not lazy:
        cfg.DATASETS.TRAIN = ("heap[:50%]",)
        with pytest.raises(ConfigError, match="COCO: heap has no JSON and thus no labels"):
            use_own_data(cfg, ("TRAIN", "UNLABELED"))
    DatasetCatalog.remove("heap")
    MetadataCatalog.remove("heap")


def test_parts_of_a_data_set(few_names):
    name = few_names[0]
    parts = [f"{name}[:10%]", f"{name}[10%:25%]", f"{name}[25%:]"]
    cfg = shapes_cfg("ssimkd", "DATASETS.TRAIN", tuple(parts[:1]), "DATASETS.UNLABELED", parts[1:])
    use_own_data(cfg, ("TRAIN", "UNLABELED"))
    found = [DatasetCatalog.get(part) for part in parts]
    assert [len(x) for x in found] == [4, 6, 30]
    assert list(itertools.chain(*found)) == DatasetCatalog.get(name)
    for part in parts:
        assert MetadataCatalog.get(part).thing_classes == MetadataCatalog.get(name).thing_classes
    with pytest.raises(ConfigError, match=r"\[:10%\] is a part of a data set"):
        check_datasets(parts, "DATASETS.TEST")
    with pytest.raises(ConfigError, match=r"no data set 'nothing\[:10%\]' is registered"):
        check_datasets(["nothing[:10%]"], "DATASETS.TRAIN")
    parts.append(f"{name}[50%:50%]")
    use_own_data(shapes_cfg("ssimkd", "DATASETS.TRAIN", tuple(parts[-1:])), ("TRAIN",))
    with pytest.raises(ConfigError, match=r"\[50%:50%\] is empty: .* has 40 images"):
        DatasetCatalog.get(parts[-1])
    for part in parts:
        DatasetCatalog.remove(part)
        MetadataCatalog.remove(part)


def stream(count, batch, seed, **options):
    records = [{"index": i, "width": 10 + 7 * i % 5, "height": 12} for i in range(count)]
    sampler = TrainingSampler(count, seed=seed)
    annotated = [{**x, "annotations": [], "segments_info": []} for x in records]
    return ResumableLoader(
        annotated, mapper=dict, sampler=sampler, total_batch_size=batch, **options
    )


def both(seed=3, **options):
    loader = stream(23, 4, seed)
    loader.unlabeled = stream(17, 3, seed + 1, labels=False, **options)
    return loader


def test_the_two_streams_are_joined_and_resumed():
    joined = list(itertools.islice(both(), 12))
    labeled, unlabeled = stream(23, 4, 3), stream(17, 3, 4, labels=False)
    assert joined == [[*a, *b] for a, b, _ in zip(labeled, unlabeled, range(12))]
    assert all(["annotations" in x for x in batch] == [True] * 4 + [False] * 3 for batch in joined)
    assert all(set(x) == {"index", "width", "height"} for batch in joined for x in batch[4:])
    first, second = both(), both(seed=99, num_workers=1)
    assert list(itertools.islice(first, 5)) == joined[:5]
    second.load_state_dict(first.state_dict())
    assert list(itertools.islice(second, 7)) == joined[5:]


def test_instances_that_a_mapper_adds_are_taken_away():
    loader = stream(4, 2, 1, labels=False)
    loader.mapper._obj.mapper.mapper = lambda record: {**record, "instances": ()}
    assert all("instances" not in x for x in next(iter(loader)))


def test_a_checkpoint_without_the_second_stream_says_so(caplog):
    both().load_state_dict(stream(23, 4, 3).state_dict())
    assert "The images without labels start anew: this resume is not exact" in caplog.text
    stream(23, 4, 3).load_state_dict(both().state_dict())


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_that_cannot_be_shared_names_its_key(size):
    with pytest.raises(ConfigError, match="change SOLVER.IMS_PER_BATCH_UNLABELED "):
        stream(17, size, 1, labels=False)


def test_a_yaml_config_builds_the_second_stream(few_names):
    opts = ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.IMS_PER_BATCH_UNLABELED", 3)
    cfg = shapes_cfg("ssimkd", *opts, "DATASETS.UNLABELED", few_names)
    cfg.DATALOADER.SKIP_BAD_IMAGES = True
    found = DistillTrainer.build_unlabeled_loader(cfg)
    assert len(found.dataset) == 40 + 12 and found.skip_bad_images
    batch = next(iter(found))
    assert len(batch) == 3 and not any("instances" in x for x in batch)


def test_the_reference_number_of_processes_scales_both_batches_and_the_schedule():
    opts = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.IMS_PER_BATCH_UNLABELED", 4)
    opts += ("MODEL.DISTILL.STOP_ITER", 90, "MODEL.DISTILL.COOLDOWN_ITERS", 20)
    opts += ("DATASETS.UNLABELED", ("ssimkd_shapes_train",))
    cfg = shapes_cfg("ssimkd", *opts, "SOLVER.REFERENCE_WORLD_SIZE", 2)
    scaled = DistillTrainer.auto_scale_workers(cfg, 4)
    solver, distill = scaled.SOLVER, scaled.MODEL.DISTILL
    assert (distill.STOP_ITER, distill.COOLDOWN_ITERS, distill.WARMUP_ITERS) == (45, 10, 0)
    assert (solver.IMS_PER_BATCH, solver.IMS_PER_BATCH_UNLABELED) == (16, 8)
    assert DistillTrainer.auto_scale_workers(cfg, 2) is cfg
    cfg.SOLVER.IMS_PER_BATCH_UNLABELED = 3
    with pytest.raises(ConfigError, match="UNLABELED must be a multiple of .* which is 2"):
        DistillTrainer.auto_scale_workers(cfg, 1)


def test_a_lazy_config_builds_the_second_stream(few_names):
    cfg = load_config("tests/engine/lazy_shapes.py", [])
    cfg.dataloader.unlabeled = cfg.dataloader.train.copy()
    cfg.dataloader.train.skip_bad_images = True
    cfg.dataloader.unlabeled.dataset.names = few_names[1]
    cfg.dataloader.unlabeled.total_batch_size = 1
    loader = stream(23, 4, 3)
    lazy_driver.add_unlabeled(cfg, loader)
    found = loader.unlabeled
    assert len(found.dataset) == 12 and found.skip_bad_images
    (item,) = next(iter(found))
    assert "image" in item and "instances" not in item
    with pytest.raises(ConfigError, match="dataloader.unlabeled: it and dataloader.train"):
        lazy_driver.add_unlabeled(cfg, SimpleNamespace())
