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
PERIOD = 10  # iterations, after which several processes ask each other for signals


class StopOnSignal(HookBase):
    """Ends a run with EXIT_STATUS, and a checkpoint, after the iteration in which a signal comes.

    All processes end after the same iteration, whichever of them got the signal; several look for
    it each PERIOD iterations. Stands behind the hook that writes checkpoints and the one that
    exports. In the last iteration a signal ends the run behind these, without an evaluation; later
    ones act as ever.

    Args:
        collect (callable): collects the state of all processes for the checkpoint.
        checkpointer (DetectionCheckpointer): writes it, on the main process.
    """

    def __init__(self, collect: Callable[[], None], checkpointer: DetectionCheckpointer) -> None:
        self.collect, self.checkpointer = collect, checkpointer
        self.received = self.agreed = 0  # by this process; by any, as all know
        self.before: Dict[int, Any] = {}

    def before_train(self) -> None:
        """Takes the signals."""
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number

    def after_step(self) -> None:
        """Ends the run if any process has got a signal."""
        done = self.trainer.iter + 1
        last = done >= self.trainer.max_iter
        if comm.get_world_size() > 1 and done % PERIOD and not last:
            return
        self.agreed = max(comm.all_gather(self.received))
        if not self.agreed or last:
            return
        self.collect()
        name = f"model_{self.trainer.iter:07d}"
        self.checkpointer.save(name, iteration=self.trainer.iter)
        logger.warning(
            "%s: stopped after %d iterations of %d; %s.pth is written, go on with --resume",
            signal.Signals(self.agreed).name,
            done,
            self.trainer.max_iter,
            name,
        )
        comm.synchronize()  # nobody leaves while the main process writes
        raise SystemExit(EXIT_STATUS)

    def after_train(self) -> None:
        """Gives the signals back, and ends a run that got one in its last iteration."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.trainer.iter < self.trainer.max_iter:
            return
        if self.agreed:
            name = signal.Signals(self.agreed).name
            logger.warning("%s: stopped before the last evaluation, go on with --resume", name)
            comm.synchronize()  # nobody leaves while the main process exports
            raise SystemExit(EXIT_STATUS)
        if self.received:  # since
            signal.raise_signal(self.received)


def ignore_cluster_signals(worker: int = 0) -> None:
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
        children = active_children()
        for child in children:
            os.kill(cast(int, child.pid), number)
        if not children:  # there is no run yet, or no more
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
