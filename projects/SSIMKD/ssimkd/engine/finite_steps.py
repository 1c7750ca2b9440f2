"""Keeps NaN and infinity out of the weights: the run stops, or leaves out the step.

Besides, the host does not wait for a GPU to know the losses of a step. It waits once in a step, for
this check, and reads the losses once for all steps between two log lines.
"""

import logging
from contextlib import contextmanager, suppress
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ssimkd.errors import one_line
from ssimkd.modeling.nonfinite import explain_nonfinite
from ssimkd.modeling.several_teachers import write_logs
from ssimkd.utils.compat import unwrap

logger = logging.getLogger(__name__)
# The loss scale starts at 2^16 and halves with each overflow. After 20 overflows in a row it is
# 2^-4, so the gradients themselves do not fit float16.
MOST_OVERFLOWS = 20


class _StepLeftOutError(Exception):
    """The gradients are not finite, so the optimizer's step must not begin."""


class FiniteSteps:
    """Makes Detectron2's SimpleTrainer or AMPTrainer keep NaN and infinity out of the weights.

    Before the optimizer's step it checks all gradients, by one norm, and this process's losses.
    Several processes have the same gradient, so they leave out the same steps. Mixed precision
    leaves out steps by itself while it looks for a loss scale. That is an error only if it never
    ends. The losses go to the event storage when :meth:`read_metrics` is called.

    Args:
        model, data_loader, optimizer: as SimpleTrainer's.
        skip (int): steps that the whole run may leave out; at the next one it stops.

    Raises:
        FloatingPointError: in :meth:`run_step`; it names the loss or the parameter, the iteration
            and the images.
    """

    iter: int
    model: nn.Module
    optimizer: Any

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: Any, *, skip: int) -> None:
        super().__init__(model, data_loader, optimizer)  # type: ignore[call-arg]
        self.allowed, self.skipped, self.overflows = skip, 0, 0
        self.batch: List[Dict[str, Any]] = []
        self.statistics: List[Tuple[Tensor, Tensor]] = []  # of batch norms, and as they were before
        self.losses: Dict[str, Tensor] = {}  # this step's, after its forward
        self.kept: List[Tuple[int, Dict[str, Tensor], float]] = []  # iteration, losses, data_time
        self.stepped = False
        model.register_forward_pre_hook(self._keep_batch)
        optimizer.register_step_pre_hook(self._check_gradients)

    def run_step(self) -> None:
        """One iteration. The optimizer makes no step where a loss or gradient is not finite."""
        self.losses, self.stepped = {}, False
        try:
            super().run_step()  # type: ignore[misc]
        except _StepLeftOutError:
            pass
        except FloatingPointError as error:
            if self.losses:
                raise
            # a part of the detector, such as its proposals, has refused the values
            raise FloatingPointError(self._explain(str(error))) from error
        if self.stepped:
            self.overflows = 0
        else:
            self._count_overflow()

    def _keep_batch(self, model: nn.Module, inputs: Any) -> None:
        if model.training:
            self.batch = inputs[0]
            statistics = statistics_of(model) if self.allowed else []
            self.statistics = [(buffer, buffer.clone()) for buffer in statistics]

    def _write_metrics(
        self, loss_dict: Mapping[str, Tensor], data_time: float, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps the values where they are, since reading them has to wait for a GPU."""
        self.losses = {name: loss.detach() for name, loss in loss_dict.items()}
        self.kept.append((self.iter, self.losses, data_time))

    def read_metrics(self) -> None:
        """Puts the losses of all steps since the last call into the event storage.

        Detectron2 does it, which gathers them from all processes: each of them has to call this.
        """
        kept, self.kept = self.kept, []
        tensors = [value.reshape(()) for _, losses, _ in kept for value in losses.values()]
        numbers = iter(torch.stack(tensors).cpu() if tensors else ())
        for iteration, losses, data_time in kept:
            # a loss that is not finite was named before its step
            with self._as_of(iteration), suppress(FloatingPointError):
                read = {name: next(numbers) for name in losses}
                super()._write_metrics(read, data_time)  # type: ignore[misc]
        write_logs(unwrap(self.model))

    @contextmanager
    def _as_of(self, iteration: int) -> Iterator[None]:
        """In this block trainer and event storage are in an earlier iteration."""
        storage, now = get_event_storage(), self.iter
        self.iter = storage.iter = iteration
        try:
            yield
        finally:
            self.iter = storage.iter = now

    def _check_gradients(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Runs before the optimizer's step.

        A step without gradients would do nothing as well, but Detectron2's clipping of gradients
        by value fails where there are none.
        """
        if self.stepped:  # Detectron2's clipping optimizer calls this hook a second time
            return
        overflow = getattr(optimizer, "found_inf", None)
        if isinstance(overflow, Tensor) and overflow.item():
            return  # a fused optimizer is called all the same, and makes no step
        self.stepped = True
        values = list(self.losses.values())
        scaler = getattr(self, "grad_scaler", None)
        if scaler is None or not scaler.is_enabled():  # a scaler has checked the gradients already
            groups = optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            values.append(get_total_norm(gradients))
        if all_finite(values):  # the one wait for a GPU
            return
        if all_finite(values[len(self.losses) :]):
            # The other processes may not know, and make the step: it cannot be left out here
            raise FloatingPointError(self._explain())
        self._leave_out()
        raise _StepLeftOutError

    def _count_overflow(self) -> None:
        """Counts a step that mixed precision has left out."""
        # each process knows its own losses
        if any(comm.all_gather(not all_finite(list(self.losses.values())))):
            self._leave_out()
            return
        self.overflows += 1
        if self.overflows > MOST_OVERFLOWS:
            raise FloatingPointError(
                f"mixed precision: {self.overflows} gradients in a row do not fit float16, at "
                f"iteration {self.iter}"
            )

    def _leave_out(self) -> None:
        """Every process calls this."""
        for buffer, before in self.statistics:  # NaN would stay in a running mean
            buffer.copy_(before)
        own = self._wrong_losses()
        others = [f"in another process: {text}" for text in comm.all_gather(own) if text]
        text = self._explain(own or next(iter(others), ""))
        if self.skipped >= self.allowed:
            raise FloatingPointError(text)
        self.skipped += 1
        logger.warning("Left out a step (%d of %d allowed): %s", self.skipped, self.allowed, text)

    def _explain(self, text: str = "") -> str:
        """Says what is not finite (or `text`) and why, in which iteration and on which images."""
        images = ", ".join(str(x.get("file_name", "of no file")) for x in self.batch)
        what = text or self._wrong_losses() or f"the gradient of {self._wrong_gradients()}"
        try:
            why = explain_nonfinite(unwrap(self.model), self.batch)
        except Exception as error:  # the message about the first error must still appear
            why = f"a second run on these images fails: {one_line(error)}"
        return f"{what}{why and f': {why}'} (iteration {self.iter}, images: {images})"

    def _wrong_losses(self) -> str:
        wrong = [f"{k} is {v.item()}" for k, v in self.losses.items() if not v.isfinite()]
        return ", ".join(wrong)

    def _wrong_gradients(self) -> str:
        names = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
        return f"{names[0] if names else 'all parameters together'}{more} is not finite"

    def state_dict(self) -> Dict[str, Any]:
        """Adds the number of steps left out so far to Detectron2's state."""
        return {**super().state_dict(), "skipped_steps": self.skipped}  # type: ignore[misc]

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Takes a checkpoint of Detectron2's own trainers as well."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self.skipped = state_dict.get("skipped_steps", 0)


def statistics_of(model: nn.Module) -> List[Tensor]:
    """The buffers of the batch norms that a training changes."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms if norm.training for buffer in norm.buffers()]


def all_finite(values: List[Tensor]) -> bool:
    """Whether all scalars are finite; they are on one device."""
    return not values or bool(torch.stack([x.isfinite().all() for x in values]).all())


class FiniteSimpleTrainer(FiniteSteps, SimpleTrainer):
    """Detectron2's SimpleTrainer with :class:`FiniteSteps`."""


class FiniteAMPTrainer(FiniteSteps, AMPTrainer):
    """Detectron2's AMPTrainer (mixed precision) with :class:`FiniteSteps`."""


def build_step_trainer(
    model: nn.Module, data_loader: Any, optimizer: Any, *, amp: bool, skip: int
) -> SimpleTrainer:
    """The trainer that takes the steps of either driver.

    Args:
        model, data_loader, optimizer: as SimpleTrainer's.
        amp (bool): mixed precision.
        skip (int): steps that the run may leave out.
    """
    kind = FiniteAMPTrainer if amp else FiniteSimpleTrainer
    return kind(model, data_loader, optimizer, skip=skip)
