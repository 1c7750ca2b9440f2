"""What both drivers add to Detectron2's training loop."""

from typing import Any, Callable, Dict, List

from detectron2.engine import HookBase
from detectron2.utils import comm

from .loader import ResumableLoader
from .random_state import get_random_state, set_random_state


class ExactResume(HookBase):
    """Keeps, in the checkpoint, the place in the data and every process's random state.

    Stands before the hook that writes checkpoints.

    Args:
        loader (ResumableLoader): the training data.
        period (int): iterations between checkpoints.
    """

    def __init__(self, loader: ResumableLoader, period: int) -> None:
        self.loader, self.period = loader, period
        self.states: List[Dict[str, Any]] = []

    def before_train(self) -> None:
        """Restores this process's generators, now that everything is built."""
        if self.states:
            set_random_state(self.states[comm.get_rank() % len(self.states)])

    def after_step(self) -> None:
        """Collects the generators of all processes where a checkpoint is about to be written."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self.states = comm.gather(get_random_state())

    def state_dict(self) -> Dict[str, Any]:
        """What the checkpoint keeps."""
        return {"random": self.states, "data": self.loader.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Takes back what the checkpoint kept; it acts when training starts."""
        self.states = state["random"]
        self.loader.load_state_dict(state["data"])


class AfterTraining(HookBase):
    """Calls a function on the main process once training has come to its end.

    Args:
        function (callable): takes nothing.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def after_train(self) -> None:
        """Not after a failure."""
        if self.trainer.iter + 1 >= self.trainer.max_iter and comm.is_main_process():
            self.function()
