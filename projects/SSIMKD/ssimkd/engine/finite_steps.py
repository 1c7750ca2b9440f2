"""Keeps NaN and infinity out of the weights: the run stops, or leaves out the step."""

import logging
from typing import Any, Dict, List, Mapping, Optional

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ssimkd.errors import one_line
from ssimkd.modeling.nonfinite import explain_nonfinite
from ssimkd.utils.compat import unwrap

logger = logging.getLogger(__name__)
# The loss scale starts at 2^16 and halves with each overflow. After 20 overflows in a row it is
# 2^-4, so the gradients themselves do not fit float16.
MOST_OVERFLOWS = 20


class _StepLeftOutError(Exception):
    """The gradients are not finite, so the optimizer's step must not begin."""


class FiniteSteps:
    """Makes Detectron2's SimpleTrainer or AMPTrainer keep NaN and infinity out of the weights.

    Before the optimizer's step it checks all gradients, by one norm, and whether Detectron2 has
    found a loss that is not finite. Several processes have the same gradient, so they leave out the
    same steps. Mixed precision leaves out steps by itself while it looks for a loss scale. That is
    an error only if it never ends.

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
        self.losses: Optional[Mapping[str, Tensor]] = None  # this step's, after its forward
        self.refused: Optional[FloatingPointError] = None  # Detectron2's error about these losses
        self.stepped = False
        model.register_forward_pre_hook(self._keep_batch)
        optimizer.register_step_pre_hook(self._check_gradients)

    def run_step(self) -> None:
        """One iteration. The optimizer makes no step where a loss or gradient is not finite."""
        self.losses, self.refused, self.stepped = None, None, False
        try:
            super().run_step()  # type: ignore[misc]
        except _StepLeftOutError:
            pass
        except FloatingPointError as error:
            if self.losses is not None:
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

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Keeps Detectron2's error until the optimizer's step, which may be left out."""
        self.losses = {name: loss.detach() for name, loss in loss_dict.items()}
        try:
            super()._write_metrics(loss_dict, *args, **kwargs)  # type: ignore[misc]
        except FloatingPointError as error:
            self.refused = error

    def _check_gradients(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Runs before the optimizer's step.

        A step without gradients would do nothing as well, but Detectron2's clipping of gradients
        by value fails where there are none.
        """
        if self.stepped:  # Detectron2's clipping optimizer calls this hook a second time
            return
        self.stepped = True
        scaler = getattr(self, "grad_scaler", None)
        if scaler is None or not scaler.is_enabled():  # a scaler has checked the gradients already
            groups = optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if not get_total_norm(gradients).isfinite():
                self._leave_out()
                raise _StepLeftOutError
        # The gradient is finite, so only the main process knows of the loss. The other processes
        # make the step, so it cannot be left out here.
        if self.refused:
            raise FloatingPointError(self._explain())

    def _count_overflow(self) -> None:
        """Counts a step that mixed precision has left out."""
        # only the main process knows whether a loss was not finite
        if any(comm.all_gather(self.refused is not None)):
            self._leave_out()
            return
        self.overflows += 1
        if self.overflows > MOST_OVERFLOWS:
            raise FloatingPointError(
                f"mixed precision: {self.overflows} gradients in a row do not fit float16, at "
                f"iteration {self.iter}"
            )

    def _leave_out(self) -> None:
        text = self._explain()
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
        losses = self.losses or {}
        wrong = [f"{k} is {v.item()}" for k, v in losses.items() if not v.isfinite()]
        if self.refused and not wrong:
            wrong = [f"in another process: {one_line(self.refused)}"]
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
