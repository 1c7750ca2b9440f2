"""The data sets that a run names: registering a user's own, and checking all before the start."""

import os
import re
from functools import partial
from itertools import chain, product
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.registry import locate

from ssimkd.errors import ConfigError, as_config_error, as_setting_error
from ssimkd.utils.config_keys import key_of, names_of
from ssimkd.utils.lazy_fields import naming_lazy_fields

from .coco_json import list_json_images, read_coco
from .image_folder import list_images
from .shapes import FOLDER

KEYS = {"NAME", "JSON", "IMAGES"}
# "name[10%:50%]", either number may be left out
PART = re.compile(r"(.+)\[(?:(\d+)%)?:(?:(\d+)%)?\]")
LAZY_KEYS = {"coco", "num_classes_from_data"}
FROM_DATA = "or DATASETS.NUM_CLASSES_FROM_DATA to True"
HOW_TO_SET = {  # head -> the keys that set its number of classes
    "roi_heads": f"MODEL.ROI_HEADS.NUM_CLASSES (model.roi_heads.num_classes), {FROM_DATA}",
    "model": f"MODEL.RETINANET.NUM_CLASSES (model.num_classes), {FROM_DATA}",
    "sem_seg_head": "MODEL.SEM_SEG_HEAD.NUM_CLASSES (model.sem_seg_head.num_classes)",
}


def use_own_data(cfg, splits: Sequence[str], classes: int = 0) -> None:
    """Registers a config's own data and, where asked, takes the number of classes from it.

    Args:
        cfg (CfgNode or DictConfig): `DATASETS.COCO` and `.NUM_CLASSES_FROM_DATA`, or the optional
            `datasets.coco` and `.num_classes_from_data`. The latter key is False afterwards.
        splits (sequence[str]): "TRAIN", "TEST", "UNLABELED": which data the run uses. The classes
            of the first one are counted; those of "TRAIN" if none is used.
        classes (int): their number where a checkpoint tells it. The data may be missing then.

    Raises:
        ConfigError: a key is wrong, a file is missing or is not in COCO's format.
    """
    if isinstance(cfg, CfgNode):
        entries, count = cfg.DATASETS.COCO, cfg.DATASETS.NUM_CLASSES_FROM_DATA
    else:
        node = cfg.get("datasets", {})
        if not isinstance(node, Mapping) or set(node) - LAZY_KEYS:
            known = ", ".join(sorted(LAZY_KEYS))
            raise ConfigError(f"datasets: there are the keys {known}, got {node}")
        entries, count = node.get("coco", []), node.get("num_classes_from_data", False)
    names = {split: names_of(cfg, split) for split in splits or ("TRAIN",)}
    if classes:
        entries = [entry for entry in entries if is_present(entry)]
    if splits or (count and not classes):
        used = {split: [PART.sub(r"\1", name) for name in names[split]] for split in names}
        unlabeled = used.pop("UNLABELED", [])
        labeled = list(chain(*used.values()))
        with naming_lazy_fields(not isinstance(cfg, CfgNode)):
            register_coco(entries, labeled, used.get("TEST", ()), unlabeled)
        for name in chain(*names.values()):
            register_part(name)
    if not count:
        return
    split = next(iter(names))
    classes = classes or count_classes(names[split], key_of(cfg, split))
    if isinstance(cfg, CfgNode):
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
        cfg.DATASETS.NUM_CLASSES_FROM_DATA = False
    else:
        head = cfg.model.roi_heads if "roi_heads" in cfg.model else cfg.model
        head.num_classes = classes
        cfg.datasets.num_classes_from_data = False


def is_present(entry: Any) -> bool:
    """Whether the files of an entry of DATASETS.COCO are there; true of an entry that is wrong."""
    values = {str(k).upper(): str(v) for k, v in entry.items()} if hasattr(entry, "items") else {}
    return set(values) != KEYS or all(os.path.exists(values[key]) for key in ("JSON", "IMAGES"))


def register_coco(
    entries: Sequence[Mapping[str, str]],
    names: Sequence[str],
    scored: Sequence[str] = (),
    unlabeled: Sequence[str] = (),
) -> None:
    """Registers a user's data in COCO's format; class names come from the json.

    Args:
        entries (sequence[mapping]): NAME (for DATASETS.TRAIN, TEST and UNLABELED), JSON (annotation
            file), IMAGES (folder), in capitals or not. One that is registered already is left
            alone. One without JSON has all images of the folder, without labels.
        names (sequence[str]): the data sets whose labels are used.
        scored (sequence[str]): those on which detections are evaluated.
        unlabeled (sequence[str]): those that are used without labels. No other files are read.

    Raises:
        ConfigError: a key is missing or unknown, a file does not exist or is not in COCO's format,
            labels are used that are not there, or another data set has the name.
    """
    key = "DATASETS.COCO"
    for entry in entries:
        values = {str(k).upper(): v for k, v in entry.items()} if isinstance(entry, Mapping) else {}
        if {"JSON", *values} != KEYS:
            raise ConfigError(
                f"{key}: an entry is a mapping of NAME, IMAGES and, with labels, JSON, got "
                f"{entry!r}"
            )
        name, images, json_file = str(values["NAME"]), str(values["IMAGES"]), values.get("JSON")
        if name not in names and name not in unlabeled:
            continue
        json_file = None if json_file is None else str(json_file)
        register_files(name, images, json_file, name in names, name in scored)
        found = MetadataCatalog.get(name)
        known, given = (found.get("json_file"), found.get("image_root")), (json_file, images)
        if [os.path.normpath(x or "") for x in known] != [os.path.normpath(x or "") for x in given]:
            raise ConfigError(f"{key}: another data set is called {name}: choose another NAME")


def register_files(
    name: str, images: str, json_file: Optional[str], labeled: bool, scored: bool
) -> None:
    """Registers one data set, if no data set has the name; see :func:`register_coco`."""
    if not os.path.isdir(images):
        raise ConfigError(f"DATASETS.COCO: {name}: there is no folder {images}")
    if labeled and json_file is None:
        raise ConfigError(
            f"DATASETS.COCO: {name} has no JSON and thus no labels: name it in DATASETS.UNLABELED "
            "alone"
        )
    metadata: Dict[str, Any] = {}
    if json_file is not None:
        with as_config_error(f"DATASETS.COCO: {name}: {json_file}", sep=" "):
            metadata = read_coco(json_file, images, scored, labeled)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if not labeled or known.get("thing_classes") or known.get("json_file") != json_file:
            return
        DatasetCatalog.remove(name)  # it was used without its labels before
        MetadataCatalog.remove(name)
    if labeled:
        register_coco_instances(name, metadata, json_file, images)
        return
    if json_file is None:
        DatasetCatalog.register(name, partial(list_images, images))
    else:
        DatasetCatalog.register(name, partial(list_json_images, json_file, images))
        MetadataCatalog.get(name).set(json_file=json_file)
    MetadataCatalog.get(name).set(image_root=images)


def build_mapper(cfg: CfgNode, is_train: bool) -> Any:
    """The mapper of a YAML config. A class of the user's own is called as Detectron2's is.

    Raises:
        ConfigError: DATALOADER.MAPPER names nothing that can be imported.
    """
    name = cfg.DATALOADER.get("MAPPER", "")
    with as_setting_error("DATALOADER.MAPPER"):
        mapper = locate(name) if name else DatasetMapper
    if mapper is DatasetMapper and not is_train:  # it would ask TRAIN for the keypoints to flip
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.KEYPOINT_ON = False
    return mapper(cfg, is_train)


def register_part(name: str) -> None:
    """Registers a part of a data set, such as "cracks_train[:10%]": the first tenth of its images.

    Getting it raises ConfigError if the part holds no image.

    Args:
        name (str): another name, or one that is registered already, is left alone.
    """
    found = PART.fullmatch(name)
    if not found or found[1] not in DatasetCatalog or name in DatasetCatalog:
        return
    whole, start, stop = found[1], int(found[2] or 0), int(found[3] or 100)

    def describe() -> None:
        metadata = MetadataCatalog.get(whole).as_dict()
        MetadataCatalog.get(name).set(**{k: v for k, v in metadata.items() if k != "name"})

    def load() -> List[Dict]:
        records = DatasetCatalog.get(whole)
        describe()  # some data sets know their classes only now
        part = records[len(records) * start // 100 : len(records) * stop // 100]
        if not part:
            raise ConfigError(f"the data set {name} is empty: {whole} has {len(records)} images")
        return part

    describe()
    DatasetCatalog.register(name, load)


def check_datasets(names: Sequence[str], key: str) -> None:
    """Raises ConfigError unless every data set is registered and its files exist.

    Args:
        names (sequence[str]): names in Detectron2's DatasetCatalog.
        key (str): the config key that names them.
    """
    missing = []
    for name in names:
        if isinstance(name, str) and PART.fullmatch(name) and "TEST" in key.upper():
            raise ConfigError(
                f"{key}: {name} is a part of a data set, and only the whole is scored"
            )
        if not isinstance(name, str) or name not in DatasetCatalog:
            raise ConfigError(
                f"{key}: no data set {name!r} is registered; DATASETS.COCO (.yaml), "
                "datasets.coco (.py) or a module of --import registers your own"
            )
        if not name.startswith(FOLDER):  # The Shapes data is drawn on first use.
            known = MetadataCatalog.get(name)
            paths = [known.get(field) for field in ("json_file", "image_root")]
            missing += [p for p in paths if p and "://" not in p and not os.path.exists(p)]
    if missing:
        raise ConfigError(
            f"{key}: Detectron2 does not find the data, {' and '.join(missing)} do not exist; "
            "set the environment variable DETECTRON2_DATASETS to the folder that holds coco/ "
            f"(it is {os.getenv('DETECTRON2_DATASETS', 'unset: ./datasets')})"
        )


def count_classes(names: Sequence[str], key: str) -> int:
    """Number of object classes in the first of several registered data sets.

    Raises:
        ConfigError: there is no data set, or it does not name its classes.
    """
    check_datasets(names, key)
    classes = classes_of(names[0]) if names else []
    if not classes:
        raise ConfigError(f"{key}: no data set here names its classes, so they cannot be counted")
    return len(classes)


def classes_of(name: str, kind: str = "thing") -> List[str]:
    """Names of a data set's "thing" or "stuff" classes; empty where its metadata has none."""
    return list(MetadataCatalog.get(name).get(f"{kind}_classes", ()))


def check_classes(model: Any, data: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError unless all data sets have the same classes, as many as the heads predict.

    Args:
        model (nn.Module): a detector. A head whose number of classes is not known is left out.
        data (mapping[str, sequence[str]]): config key -> the data sets that it names.
    """
    things = "roi_heads" if hasattr(model, "roi_heads") else "model"
    heads = {
        "thing": (things, getattr(model, "roi_heads", model)),
        "stuff": ("sem_seg_head", getattr(model, "sem_seg_head", None)),
    }
    first: Dict[str, Tuple[str, List[str]]] = {}
    for key, names in data.items():
        for name, (kind, (where, head)) in product(names, heads.items()):
            found, expected = classes_of(name, kind), classes_in(head)
            if not (found and expected):
                continue
            if len(found) != expected:
                raise ConfigError(
                    f"{key}: {name} has {len(found)} {kind} classes and the head has {expected}: "
                    f"set {HOW_TO_SET[where]}"
                )
            other, classes = first.setdefault(kind, (name, found))
            for a, b in zip(classes, found):
                if a != b:
                    raise ConfigError(
                        f"{key}: {name} has the class {b!r} where {other} has {a!r}: their json "
                        "files must give the same ids to the same names"
                    )


def check_trained_order(
    categories: Sequence[Mapping[str, Any]], data: Mapping[str, Sequence[str]]
) -> None:
    """Raises ConfigError if a data set has the classes of a checkpoint in another order.

    Args:
        categories (sequence[mapping]): "name" of each class that the checkpoint was trained on, in
            the order of the heads' outputs; (): not known. A class may have another name here.
        data (mapping[str, sequence[str]]): config key -> the data sets that it names.
    """
    trained = [category["name"] for category in categories]
    for key, names in data.items():
        for name in names:
            for own, other in zip(classes_of(name), trained):
                if own != other and own in trained:
                    raise ConfigError(
                        f"{key}: {name} has the class {own!r} where the checkpoint was trained on "
                        f"{other!r}: both json files must give the same ids to the same names"
                    )


def categories_of(cfg) -> List[Dict[str, Any]]:
    """COCO's categories of a config's data, in the order of the heads' outputs.

    Returns:
        list[dict]: "id" and "name" of each; empty where no registered data set names its classes.
    """
    for source in (*names_of(cfg, "TEST"), *names_of(cfg, "TRAIN")):
        names = classes_of(source) if source in MetadataCatalog.list() else []
        if names:
            contiguous = MetadataCatalog.get(source).get("thing_dataset_id_to_contiguous_id", {})
            ids = {index: id for id, index in contiguous.items()}
            first = MetadataCatalog.get(source).get("evaluator_type") == "lvis"  # it counts from 1
            return [{"id": ids.get(i, i + first), "name": name} for i, name in enumerate(names)]
    return []


def image_ids_of(cfg) -> Dict[str, Any]:
    """Real path of an image file -> its id, of all test data of a config that is there.

    An image of several data sets has its id in the first of them.
    """
    ids: Dict[str, Any] = {}
    for name in names_of(cfg, "TEST"):
        known = MetadataCatalog.get(name) if name in DatasetCatalog else None
        if known and os.path.isfile(known.get("json_file", "")):
            records = DatasetCatalog.get(name)
            ids = {**{os.path.realpath(r["file_name"]): r["image_id"] for r in records}, **ids}
    return ids


def training_classes(cfg) -> List[str]:
    """The class names of a config's first training data set; [] if they are not known."""
    names = [name for name in names_of(cfg, "TRAIN")[:1] if name in MetadataCatalog.list()]
    return classes_of(names[0]) if names else []


def classes_in(head: Any) -> int:
    """Number of classes that a head predicts; 0 where it is not known."""
    found = getattr(head, "num_classes", None)
    if found is None and hasattr(head, "predictor"):  # a head of semantic segmentation
        found = head.predictor.out_channels
    return found if isinstance(found, int) else 0
