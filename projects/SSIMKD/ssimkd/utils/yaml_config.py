"""Reading YAML configs, without running what they hold."""

from detectron2.config import CfgNode
from yaml import SafeLoader
from yaml.constructor import ConstructorError

from ssimkd.errors import ConfigError, one_line

# The anchors of Detectron2's RetinaNets are written as an expression: the only one that is run.
ANCHORS = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"
EVAL = "tag:yaml.org,2002:python/object/apply:eval"

FLOAT = "Type mismatch (<class 'float'> vs. <class 'int'>)"


def _anchors(loader: SafeLoader, node) -> list:
    if loader.construct_sequence(node) != [ANCHORS]:
        raise ConstructorError(None, None, f"cannot run the tag {EVAL!r}", node.start_mark)
    return [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]


SafeLoader.add_constructor(EVAL, _anchors)


def merge_yaml(cfg: CfgNode, path: str) -> None:
    """Merges a file into a config, in place, as Detectron2 does.

    Raises:
        ConfigError: it holds code, or is of another shape or type than the config.
    """
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except ConstructorError as error:
        raise ConfigError(
            f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: code in a .yaml is "
            f"not run: {error.problem}; write its value, or a .py config"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{path} holds no keys") from error
    except Exception as error:
        hint = "; write it with a decimal point" if FLOAT in str(error) else ""
        raise ConfigError(f"{path}: {one_line(error)}{hint}") from error
