"""After Ctrl-C, or when a cluster takes its machines back, a run writes a checkpoint and ends."""

import logging
import os
import signal
import time
from multiprocessing import active_children, parent_process
from threading import Thread
from typing import Any, Callable, Dict, cast

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STATUS = os.EX_TEMPFAIL  # 75 means that the job should be started again, with --resume
INTERRUPTED = 128 + signal.SIGINT  # the status of a program that Ctrl-C has ended
SAME = 1.0  # seconds within which several SIGINT are one: terminal and parent may both send it
PERIOD = 10  # iterations between exchanges of signals, where there are several processes


class StopOnSignal(HookBase):
    """Writes a checkpoint and ends the run with EXIT_STATUS, or INTERRUPTED, after a signal.

    A single process ends after the iteration in which the signal comes. Several processes exchange
    their signals every PERIOD iterations, and all end after the same iteration. This hook follows
    the hooks that write checkpoints and export the student. So after a signal in the last iteration
    both are done, and only the evaluation is left out. A signal during the last evaluation ends the
    process at once, as the second Ctrl-C does at any time.

    Args:
        collect (callable): collects the state of all processes for the checkpoint.
        checkpointer (DetectionCheckpointer): writes it, on the main process.
    """

    def __init__(self, collect: Callable[[], None], checkpointer: DetectionCheckpointer) -> None:
        self.collect, self.checkpointer = collect, checkpointer
        self.received = 0  # the signal that this process has received
        self.when = 0.0  # its time
        self.agreed = 0  # a signal that any process has received and all know of
        self.before: Dict[int, Any] = {}  # the handlers that this hook replaces

    def before_train(self) -> None:
        """Begins to wait for signals."""
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        if number == self.received == signal.SIGINT and time.monotonic() - self.when > SAME:
            raise KeyboardInterrupt
        self.received, self.when = number, time.monotonic()

    def after_step(self) -> None:
        """Ends the run if any process has received a signal."""
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
            "%s: stopped after %d iterations of %d; %s.pth is written. Go on with --resume",
            signal.Signals(self.agreed).name,
            done,
            self.trainer.max_iter,
            name,
        )
        comm.synchronize()  # wait until the main process has written the checkpoint
        raise SystemExit(self._status())

    def _status(self) -> int:
        return INTERRUPTED if self.agreed == signal.SIGINT else EXIT_STATUS

    def after_train(self) -> None:
        """Restores the handlers, and ends a run that received a signal in its last iteration."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.trainer.iter < self.trainer.max_iter:
            return
        if self.agreed:
            name = signal.Signals(self.agreed).name
            logger.warning("%s: stopped before the last evaluation. Go on with --resume", name)
            comm.synchronize()  # wait until the main process has exported the student
            raise SystemExit(self._status())
        if self.received:  # since the last exchange: the former handler takes it
            signal.raise_signal(self.received)


def ignore_cluster_signals(worker: int = 0) -> None:
    """Lets a process that loads images ignore signals, but not those of its parent.

    A cluster, or Ctrl-C, sends its signals to all processes of a job. The training process still
    needs images to finish its iteration. It ends the loading processes afterwards, by SIGTERM.
    """
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it, and clusters do not run macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        Thread(target=_obey, args=(cast(Any, parent_process()).pid,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def forward_to_children() -> None:
    """Passes signals on to the processes that this process has started (--num-gpus)."""

    def forward(number: int, frame: Any) -> None:
        children = active_children()
        for child in children:
            os.kill(cast(int, child.pid), number)
        if not children:  # the processes have not started yet, or have ended
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, forward)
