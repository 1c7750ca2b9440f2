"""A cluster takes its machines back: the run writes a checkpoint and ends."""

import logging
import os
import signal
from multiprocessing import active_children, parent_process
from threading import Thread
from typing import Any, Callable, Dict, cast

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = os.EX_TEMPFAIL  # 75: come again, with --resume


class StopOnSignal(HookBase):
    """Ends a run with EXIT_STATUS, and a checkpoint, after the iteration in which a signal comes.

    All processes end after the same iteration, whichever of them got the signal. Stands behind the
    hook that writes checkpoints. In the last iteration, and after it, a signal acts as ever.

    Args:
        collect (callable): collects the state of all processes for the checkpoint.
        checkpointer (DetectionCheckpointer): writes it, on the main process.
    """

    def __init__(self, collect: Callable[[], None], checkpointer: DetectionCheckpointer) -> None:
        self.collect, self.checkpointer = collect, checkpointer
        self.received = 0
        self.before: Dict[int, Any] = {}

    def before_train(self) -> None:
        """Takes the signals."""
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number

    def after_step(self) -> None:
        """Ends the run if any process has got a signal."""
        received = max(comm.all_gather(self.received))
        done = self.trainer.iter + 1
        if not received or done >= self.trainer.max_iter:
            return
        self.collect()
        name = f"model_{self.trainer.iter:07d}"
        self.checkpointer.save(name, iteration=self.trainer.iter)
        logger.warning(
            "%s: stopped after %d iterations of %d; %s.pth is written, go on with --resume",
            signal.Signals(received).name,
            done,
            self.trainer.max_iter,
            name,
        )
        comm.synchronize()  # nobody leaves while the main process writes
        raise SystemExit(EXIT_STATUS)

    def after_train(self) -> None:
        """Gives the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_to_parent(worker: int = 0) -> None:
    """In a process that loads images: of these signals it obeys its parent's alone.

    A cluster sends them to all of a job's processes; the parent needs its images for the iteration
    under way, and ends it afterwards, by the same signal.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, which is no cluster
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        Thread(target=_obey, args=(cast(Any, parent_process()).pid,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def forward_to_children() -> None:
    """In the process that `--num-gpus` makes the parent of a run's: passes the signals on."""

    def forward(number: int, frame: Any) -> None:
        for child in active_children():
            os.kill(cast(int, child.pid), number)

    for number in SIGNALS:
        signal.signal(number, forward)
