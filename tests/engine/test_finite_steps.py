"""A run stops at NaN or infinity in a loss or gradient, or leaves out the step."""

import copy
import itertools
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from ssimkd.engine import finite_steps
from ssimkd.engine.finite_steps import MOST_OVERFLOWS, FiniteSimpleTrainer, FiniteSteps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Model(nn.Module):
    """loss_a has an infinite gradient where "root" is 0; loss_b is proportional to "value"."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, batch):
        (x,) = batch
        root = (self.weight * x["root"]).sqrt().sum()
        return {"loss_a": root, "loss_b": (self.weight**2).sum() * x["value"]}


def batch(number, root=1.0, value=1.0):
    return [{"root": root, "value": value + 0.1 * number, "file_name": f"{number}.jpg"}]


class AMPStep(SimpleTrainer):
    """AMPTrainer's step, whose loss scale works on a CPU as well."""

    grad_scaler = torch.amp.GradScaler("cpu")

    def run_step(self):
        losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._write_metrics(losses, 0.0)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


class ScaledTrainer(FiniteSteps, AMPStep):
    """FiniteAMPTrainer, on a CPU."""


def build(batches, allowed=0, kind=FiniteSimpleTrainer, clip=False):
    torch.manual_seed(0)
    model, optimizer = Model(), torch.optim.SGD
    if clip:
        cfg = get_cfg()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    optimizer = optimizer(model.parameters(), lr=0.01, momentum=0.9)
    return kind(model, batches, optimizer, skip=allowed)


def train(batches, *args, **options):
    """Trains on these batches; returns the trainer, and what it raised as `failed`."""
    trainer = build(batches, *args, **options)
    trainer.failed = None
    try:
        trainer.train(0, len(batches))
    except FloatingPointError as error:
        trainer.failed = str(error)
    return trainer


WRONG = {
    "loss": (dict(value=math.nan), "loss_b is nan"),
    "infinite loss": (dict(value=math.inf), "loss_b is inf"),
    "gradient": (dict(root=0.0), "the gradient of weight is not finite"),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("wrong, message", WRONG.values(), ids=WRONG)
def test_it_stops_before_the_step_and_names_iteration_and_images(wrong, message, clip):
    batches = [batch(0), batch(1), batch(2, **wrong), batch(3)]
    trainer = train(batches, clip=clip)
    assert trainer.failed == f"{message} (iteration 2, images: 2.jpg)"
    assert torch.equal(trainer.model.weight, train(batches[:2], clip=clip).model.weight)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("wrong, _", WRONG.values(), ids=WRONG)
def test_a_step_left_out_is_as_if_its_images_were_not_there(wrong, _, clip):
    batches = [batch(0), batch(1), batch(2, **wrong), batch(3), batch(4)]
    skipping = train(batches, allowed=1, clip=clip)
    without = train([*batches[:2], *batches[3:]], clip=clip)
    assert skipping.skipped == 1 and skipping.failed is None
    assert torch.equal(skipping.model.weight, without.model.weight)
    momenta = [x.optimizer.state[x.model.weight]["momentum_buffer"] for x in (skipping, without)]
    assert torch.equal(*momenta)


class Normalized(Model):
    """A batch norm sees what becomes NaN."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch):
        (x,) = batch
        self.norm(torch.rand(4, 2) * x["value"])
        return super().forward(batch)


def test_a_step_left_out_does_not_change_the_statistics_of_batch_norms():
    def run(values):
        torch.manual_seed(0)
        model = Normalized()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        batches = [batch(0, value=value) for value in values]
        FiniteSimpleTrainer(model, batches, optimizer, skip=1).train(0, len(batches))
        return model.norm

    found, expected = run([1.0, math.nan]), run([1.0])
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_fused_optimizer_leaves_out_steps_with_mixed_precision():
    trainer = build([batch(0), batch(1, value=math.nan), batch(2)], 1, ScaledTrainer)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.01, fused=True)
    trainer.optimizer.register_step_pre_hook(trainer._check_gradients)
    trainer.train(0, 3)
    assert trainer.skipped == 1 and trainer.model.weight.isfinite().all()


def test_the_limit_of_left_out_steps_holds_across_a_resume():
    batches = [batch(0), batch(1, root=0.0), batch(2), batch(3, value=math.nan)]
    trainer = train(batches, allowed=1)
    assert trainer.failed.startswith("loss_b is nan (iteration 3")
    resumed = build(batches, allowed=1)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert resumed.skipped == 1
    assert train(batches, allowed=2).failed is None


def test_mixed_precision_may_overflow_20_times_in_a_row_and_no_more():
    few = [batch(n, root=0.0) for n in range(MOST_OVERFLOWS)]
    trainer = train([*few, batch(9)], kind=ScaledTrainer)
    assert trainer.failed is None and trainer.skipped == 0
    trainer = train([*few, batch(9, root=0.0)], kind=ScaledTrainer)
    assert trainer.failed.startswith(f"mixed precision: {MOST_OVERFLOWS + 1} gradients in a row")
    trainer = train([batch(0), batch(1, value=math.nan)], kind=ScaledTrainer)
    assert trainer.failed == "loss_b is nan (iteration 1, images: 1.jpg)"


def test_gradients_are_not_checked_twice_with_mixed_precision(monkeypatch):
    monkeypatch.setattr(finite_steps, "get_total_norm", None)
    batches = [batch(0), batch(1, root=0.0), batch(2)]
    assert train(batches, kind=ScaledTrainer).failed is None


@pytest.mark.parametrize("said, counts", [([True, False], (1, 0)), ([False, False], (0, 1))])
def test_all_processes_count_the_same_left_out_steps_with_mixed_precision(
    said, counts, monkeypatch
):
    """Only the main process knows whether a loss was not finite."""
    monkeypatch.setattr(finite_steps.comm, "all_gather", lambda own: said)
    trainer = train([batch(0), batch(1, root=0.0)], allowed=1, kind=ScaledTrainer)
    assert (trainer.skipped, trainer.overflows) == counts


def test_an_error_of_the_forward_gets_iteration_and_images():
    """Detectron2's proposals refuse boxes that are not finite."""

    class Refusing(Model):
        def forward(self, batch):
            raise FloatingPointError("Training has diverged.")

    model = Refusing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = FiniteSimpleTrainer(model, [batch(0)], optimizer, skip=1)
    with pytest.raises(FloatingPointError, match=r"diverged. \(iteration 0, images: 0.jpg\)"):
        trainer.train(0, 1)


def test_one_wrong_gradient_of_many_is_found_and_named():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = FiniteSimpleTrainer(model, [], optimizer, skip=0)
    for index, bad in itertools.product((0, 7, 19), (math.nan, math.inf, -math.inf)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model[index].bias.grad[1] = bad
        trainer.stepped = False
        with pytest.raises(FloatingPointError, match=rf"the gradient of {index}.bias is not"):
            optimizer.step()


def test_a_loss_that_is_not_finite_stops_the_run_though_the_gradient_is():
    """The other processes make the step, so it cannot be left out."""

    class Constant(Model):
        def forward(self, batch):
            return {"loss_a": self.weight.sum() + math.nan}

    for allowed in (0, 1):
        model = Constant()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = FiniteSimpleTrainer(model, [batch(0)], optimizer, skip=allowed)
        with pytest.raises(FloatingPointError, match=r"^loss_a is nan \(iteration 0, images: 0"):
            trainer.train(0, 1)
        assert torch.equal(model.weight, Model().weight) and trainer.skipped == 0


def test_a_loss_of_another_process_is_named(monkeypatch):
    monkeypatch.setattr(finite_steps.comm, "all_gather", lambda own: [own, "loss_b is nan"])
    trainer = train([batch(0, root=0.0)])
    assert trainer.failed == "in another process: loss_b is nan (iteration 0, images: 0.jpg)"


def test_losses_are_read_together_and_belong_to_their_iterations():
    batches = [batch(0), batch(1), batch(2, value=math.nan), batch(3)]
    trainer = train(batches, allowed=1)
    assert "loss_a" not in trainer.storage.latest() and len(trainer.kept) == 4
    with trainer.storage:
        trainer.read_metrics()
    assert trainer.kept == []
    found = {name: trainer.storage.history(name).values() for name in ("loss_a", "total_loss")}
    assert [iteration for _, iteration in found["loss_a"]] == [0, 1, 3]
    weight, values = torch.tensor([1.0, 2.0]), {i: v for v, i in found["loss_a"]}
    assert values[0] == pytest.approx(weight.sqrt().sum().item())
    assert trainer.storage.iter == 4


def test_a_step_reads_one_number_from_the_device():
    class Reads(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    trainer = build([batch(0), batch(1)])
    trainer.iter = 0
    with Reads() as reads:
        trainer.run_step()
    assert reads.found == 1
