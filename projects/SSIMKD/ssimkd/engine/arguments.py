"""From a command line to a config that can run."""

import argparse
import os
from typing import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from omegaconf import OmegaConf

from ssimkd.checkpoint.run_checkpointer import checkpoints_in
from ssimkd.data.datasets import check_datasets, use_own_data
from ssimkd.errors import ConfigError, as_config_error
from ssimkd.utils import config_files
from ssimkd.utils.config_keys import datasets_of, key_of, setting, value_of
from ssimkd.utils.user_code import import_user_code

from .run_record import import_of_file, import_recorded

SPLITS = ("TRAIN", "TEST", "UNLABELED")


def load_arguments(args: argparse.Namespace):
    """The config that the command line of `ssimkd train` names; see :func:`load_config`."""
    return add_data(read_arguments(args), args)


def add_data(cfg, args: argparse.Namespace):
    """The config of :func:`read_arguments`, once the data that the run uses is registered."""
    return with_own_data(cfg, ("TEST",) if args.eval_only else SPLITS)


def read_arguments(args: argparse.Namespace):
    """The config that the command line of `ssimkd train` names, without the user's data.

    A run that is resumed or evaluated imports its modules first: the config may have keys of a loss
    that one of them registers.
    """
    import_user_code(args.imports)
    if args.resume:
        import_recorded(setting_before_imports(args, "output"))
    if args.eval_only:
        import_of_file(setting_before_imports(args, "weights"))
    cfg = read_config(args.config_file, args.opts)
    if args.skip_bad_images and isinstance(cfg, CfgNode):
        cfg.DATALOADER.SKIP_BAD_IMAGES = True
    elif args.skip_bad_images:
        OmegaConf.update(cfg, "dataloader.train.skip_bad_images", True, force_add=True)
    return cfg


def setting_before_imports(args: argparse.Namespace, name: str) -> str:
    """A setting of KEYS as text, "" if it is not set. Other keys of a `.yaml` need not exist."""
    if not args.config_file:
        return ""
    with as_config_error("--config-file"):
        path = config_files.find_config(args.config_file)
    if path.endswith(".py"):
        return str(setting(read_config(path, args.opts), name) or "")
    return config_files.read_unchecked(path, args.opts, key_of(get_cfg(), name))


def load_config(
    path: str, overrides: Sequence[str] = (), splits: Sequence[str] = SPLITS, classes: int = 0
):
    """The config that a user names, with their own data registered.

    Args:
        path (str): a file, or the name of one of this project's configs; see :func:`find_config`.
        overrides (sequence[str]): KEY, VALUE, ... (.yaml) or key=value, ... (.py).
        splits (sequence[str]): some of SPLITS; their data of `DATASETS.COCO` is registered.
        classes (int): see :func:`use_own_data`.

    Raises:
        ConfigError: the file cannot be read, an override does not apply, or the data is wrong.
    """
    return with_own_data(read_config(path, overrides), splits, classes)


def read_config(path: str, overrides: Sequence[str]):
    """The config that a user names, without their data. It is not frozen."""
    if not path:
        raise ConfigError(
            "--config-file is missing, for example --config-file configs/ssimkd_R50.yaml"
        )
    with as_config_error("--config-file"):
        path = config_files.find_config(path)
    import_of_file(path)  # it may be the config.yaml of a run
    return config_files.load_config(path, list(overrides))


def with_own_data(cfg, splits: Sequence[str], classes: int = 0):
    """The same config, frozen, once the user's own data is registered; see :func:`load_config`."""
    if isinstance(cfg, CfgNode):
        check_no_none(cfg.MODEL.DISTILL, "MODEL.DISTILL")
    use_own_data(cfg, splits, classes)
    if isinstance(cfg, CfgNode):
        cfg.freeze()
    return cfg


def check_no_none(node: CfgNode, name: str) -> None:
    """Raises ConfigError for a key that is None. Yacs accepts None in place of any value."""
    for key, value in node.items():
        if value is None:
            raise ConfigError(f"{name}.{key} is None: give it a value, or leave it out")
        if isinstance(value, CfgNode):
            check_no_none(value, f"{name}.{key}")


def check_config(cfg, args: argparse.Namespace) -> str:
    """Raises ConfigError for missing data sets, checkpoints and devices, before anything is built.

    Args:
        cfg (CfgNode or DictConfig): of :func:`load_arguments`.
        args (Namespace): of `ssimkd train`.

    Returns:
        str: the config's device, such as "cuda" or "cpu".
    """
    splits = ("TEST",) if args.eval_only else ("UNLABELED", "TEST", "TRAIN")
    used = datasets_of(cfg, *splits)
    *_, needed = used
    # a LazyConfig may have a loader or records of the user's own, without names
    unnamed = not isinstance(cfg, CfgNode) and value_of(cfg, needed) is None
    own = unnamed and value_of(cfg, needed.partition(".dataset")[0]) is not None
    if not used[needed] and not own:
        raise ConfigError(f"{needed} is empty: name at least one data set")
    for key, names in used.items():
        check_datasets(names, key)
    if not (args.resume and checkpoints_in(setting(cfg, "output"))):
        weights = str(setting(cfg, "weights") or "")
        check_weights(key_of(cfg, "weights"), weights, needed=args.eval_only)
    device = str(setting(cfg, "device"))
    check_processes(args, device, key_of(cfg, "device"))
    if setting(cfg, "amp") and not torch.cuda.is_available() and not args.eval_only:
        key = key_of(cfg, "amp")
        raise ConfigError(f"{key}: Detectron2 trains with mixed precision on a GPU only")
    return device


def check_weights(key: str, weights: str, needed: bool) -> None:
    """Raises ConfigError if a needed checkpoint is not named, or a named one does not exist."""
    if needed and not weights:
        raise ConfigError(f"{key} is empty: name the checkpoint to evaluate")
    if weights and "://" not in weights and not os.path.isfile(weights.split("?")[0]):
        raise ConfigError(f"{key}: there is no file {weights}")


def check_processes(args: argparse.Namespace, device: str, device_key: str) -> None:
    """Raises ConfigError for an impossible number of processes, or a device that is not there."""
    for flag, value, least in (
        ("--num-gpus", args.num_gpus, 0),
        ("--num-machines", args.num_machines, 1),
        ("--machine-rank", args.machine_rank, 0),
    ):
        if value < least:
            raise ConfigError(f"{flag} is {value}: it must be at least {least}")
    if args.machine_rank >= args.num_machines:
        raise ConfigError(
            f"--machine-rank is {args.machine_rank}: it must be below --num-machines, which is "
            f"{args.num_machines}"
        )
    if args.num_machines > 1 and "://" not in args.dist_url:
        raise ConfigError(f"--dist-url: {args.dist_url} is not an address such as tcp://host:port")
    cuda, gpus = device.startswith("cuda"), torch.cuda.device_count()
    if args.num_gpus > 1 and not cuda:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} and the device is {device}: it starts a process for "
            "each GPU; torchrun starts several processes on a CPU"
        )
    if cuda and max(args.num_gpus, 1) > gpus:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} and this machine has {gpus} GPUs; without a GPU, set "
            f"{device_key} to cpu"
        )
