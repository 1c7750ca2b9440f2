"""How a loss gets from its file into the registry and the config."""

import importlib
import inspect
import sys
from pkgutil import iter_modules

import pytest
import ssimkd.losses
from conftest import image_batch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage
from ssimkd import KD_LOSS_REGISTRY, ConfigError, add_ssimkd_config
from ssimkd.registry import loss_defaults, register_loss

OWN_LOSS = '''
from ssimkd.losses import MapLoss, register_loss


@register_loss("own")
class OwnLoss(MapLoss):
    """mean |S - T|^power."""

    def __init__(self, weight: float = 3, power: float = 2, scope: str = "channel"):
        super().__init__(weight, "minmax", scope)
        self.power = power

    def compare(self, student, teacher):
        return (student - teacher).abs().pow(self.power).mean()
'''


@pytest.fixture
def own_loss(tmp_path, monkeypatch):
    """Imports a user's module with one loss; afterwards the registry is as before."""
    (tmp_path / "own_losses.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_losses").OwnLoss
    del KD_LOSS_REGISTRY._obj_map["own"], sys.modules["own_losses"]


def config_node(name):
    cfg = get_cfg()
    add_ssimkd_config(cfg)
    return cfg.MODEL.DISTILL[name.upper()]


def test_every_file_of_the_folder_is_imported():
    for module in iter_modules(ssimkd.losses.__path__):
        assert f"ssimkd.losses.{module.name}" in sys.modules


@pytest.mark.parametrize("name", sorted(name for name, _ in KD_LOSS_REGISTRY))
def test_a_config_node_has_the_signature_and_defaults_of_its_loss(name):
    cls = KD_LOSS_REGISTRY.get(name)
    assert cls.name == name and getattr(ssimkd.losses, cls.__name__) is cls
    parameters = inspect.signature(cls).parameters
    node = config_node(name)
    assert {k: p.default for k, p in parameters.items()} == {k.lower(): v for k, v in node.items()}
    for option, parameter in parameters.items():
        assert type(node[option.upper()]) is type(parameter.default)
    assert "WEIGHT" in node


def test_a_users_file_with_one_class_is_enough_to_train_with(own_loss, student):
    assert dict(config_node("own")) == {"WEIGHT": 3.0, "POWER": 2.0, "SCOPE": "channel"}
    assert type(config_node("own").POWER) is float  # by its annotation: 1.5 can replace it
    key = "MODEL.DISTILL"
    model = student(f"{key}.LOSSES", ("own",), f"{key}.OWN.POWER", 1.5)
    assert type(model.distiller.losses["own"]) is own_loss
    with EventStorage() as storage:
        losses = model(image_batch((96, 96)))
    parts = [value for name, (value, _) in storage.latest().items() if name.startswith("own_kd/")]
    assert losses["own_kd_loss"].item() == pytest.approx(3 * sum(parts), rel=1e-5)
    losses["own_kd_loss"].backward()
    assert any(p.grad is not None for p in model.backbone.parameters())


def test_an_argument_without_default_is_refused():
    class Loss:
        def __init__(self, weight):
            pass

    with pytest.raises(TypeError, match="Loss: the argument weight needs a default"):
        register_loss("own")(Loss)
    assert "own" not in KD_LOSS_REGISTRY


def test_tuples_stay_tuples_and_other_arguments_are_no_keys():
    def loss(sizes=(1, 2), *, weight: "float" = 1, count: int = 2, **others):
        pass

    found = loss_defaults(loss)
    assert found == {"sizes": (1, 2), "weight": 1.0, "count": 2}
    assert [type(value) for value in found.values()] == [tuple, float, int]


def test_a_loss_with_the_name_of_another_key_is_refused(monkeypatch):
    monkeypatch.setitem(KD_LOSS_REGISTRY._obj_map, "teacher", KD_LOSS_REGISTRY.get("l1"))
    with pytest.raises(ConfigError, match="DISTILL.TEACHER exists already: rename the loss"):
        add_ssimkd_config(get_cfg())
