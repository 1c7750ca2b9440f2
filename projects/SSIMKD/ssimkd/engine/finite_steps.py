"""No step with NaN or infinity: it is named, and the run stops or, where asked, leaves it out."""

import logging
from functools import wraps
from types import MethodType
from typing import Any, Dict, List, Mapping, Optional

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ssimkd.errors import one_line

logger = logging.getLogger(__name__)
# A loss scale starts at 2^16 and halves with each overflow: after so many, gradients do not fit
# float16 at all.
MOST_OVERFLOWS = 20


class FiniteSteps(HookBase):
    """Checks every gradient, by one norm of all, before the optimizer's step, and every loss.

    With several processes all of them see the same gradient, so they leave out the same steps.
    Mixed precision leaves out steps of its own accord while it looks for a loss scale: that is no
    fault unless it never ends.

    Args:
        allowed (int): steps that the whole run may leave out; at the next one it stops.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.skipped = allowed, 0
        self.stepped, self.overflows, self.scaled = False, 0, False
        self.files: List[str] = []
        self.losses: Mapping[str, Tensor] = {}
        self.refused: Optional[FloatingPointError] = None  # what Detectron2 said of the losses

    def before_train(self) -> None:
        """Looks at what the model returns, at what Detectron2 says of it, and at the optimizer."""
        inner = self._inner()
        # such a scaler has looked at the gradients before it takes a step
        self.scaled = hasattr(inner, "grad_scaler") and inner.grad_scaler.is_enabled()
        self.before = (inner._write_metrics, inner.optimizer.step)
        self.handle = inner.model.register_forward_hook(self._note)
        inner._write_metrics = self._write_metrics
        # a method of the optimizer, as torch's schedulers expect when they wrap it in turn,
        # and with the mark of one that has done so already
        step = wraps(inner.optimizer.step)(lambda _, *args: self._step(*args))
        inner.optimizer.step = MethodType(step, inner.optimizer)

    def after_train(self) -> None:
        """Leaves nothing behind."""
        inner = self._inner()
        inner._write_metrics, inner.optimizer.step = self.before
        self.handle.remove()

    def _inner(self) -> Any:
        """The trainer that takes the steps; DefaultTrainer has it inside."""
        return getattr(self.trainer, "_trainer", self.trainer)

    def before_step(self) -> None:
        """A new step."""
        self.stepped, self.refused = False, None

    def after_step(self) -> None:
        """Sees to the steps that mixed precision has left out."""
        if self.stepped:
            self.overflows = 0
        elif any(comm.all_gather(bool(self.refused))):  # the main process alone knows of it
            self._leave_out()
        else:
            self.overflows += 1
            if self.overflows > MOST_OVERFLOWS:
                raise FloatingPointError(
                    f"mixed precision: {self.overflows} gradients in a row do not fit float16, at "
                    f"iteration {self.trainer.iter}"
                )

    def _note(self, model: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        if model.training:
            self.files = files_of(inputs[0])
            self.losses = {name: loss.detach() for name, loss in losses.items()}

    def _write_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Detectron2's, whose error waits for the optimizer's step: it may be left out."""
        try:
            self.before[0](*args, **kwargs)
        except FloatingPointError as error:
            self.refused = error

    def _step(self, *args: Any) -> Any:
        """The optimizer's, if its gradients are finite."""
        self.stepped = True
        if not self.scaled:
            groups = self.trainer.optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if not get_total_norm(gradients).isfinite():
                return self._leave_out()
        if self.refused:  # only the main process knows of it: it cannot be left out
            raise FloatingPointError(self._explain())
        return self.before[1](*args)

    def _leave_out(self) -> None:
        if self.skipped >= self.allowed:
            raise FloatingPointError(self._explain())
        self.skipped += 1
        counted = f"{self.skipped} of {self.allowed}"
        logger.warning("Left out a step (%s allowed): %s", counted, self._explain())

    def _explain(self) -> str:
        """What is wrong: this process's losses, another's, or the gradient alone; and where."""
        wrong = [f"{k} is {v.item()}" for k, v in self.losses.items() if not v.isfinite()]
        if self.refused and not wrong:
            wrong = [f"in another process: {one_line(self.refused)}"]
        what = ", ".join(wrong) or f"the gradient of {self._wrong_gradients()} is not finite"
        return f"{what} ({place(self.trainer.iter, self.files)})"

    def _wrong_gradients(self) -> str:
        names = [
            name
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
        return f"{names[0]}{more}" if names else "all parameters together"

    def state_dict(self) -> Dict[str, int]:
        """How many steps were left out so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """Counts on."""
        self.skipped = state["skipped"]


def files_of(batched_inputs: List[Dict]) -> List[str]:
    """The image files of a batch."""
    return [str(x.get("file_name", "of no file")) for x in batched_inputs]


def place(iteration: int, files: List[str]) -> str:
    """Where in a run something went wrong, in words."""
    return f"iteration {iteration}, images: {', '.join(files)}"
