"""Signals that ask a run to stop, also while it waits for data."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator

from t2tvit.errors import RunError, SaidElsewhere
from t2tvit.training.distributed import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# How long a process that was asked to stop waits for its next batch, in seconds. Alone it loses
# nothing by not waiting. One of many ends without saving a state, so it waits for a slow loader,
# but less than the 30 seconds after which torchrun kills it.
PATIENCE_ALONE, PATIENCE_OF_MANY = 0.5, 15.0


class Stopped(Exception):
    """A signal asked the run to end.

    ``is_kept``: all that was done is on the disk, not only the state before. ``is_elsewhere``: the
    signal came to another node of torchrun's, and none to this one.
    """

    def __init__(self, is_kept: bool, is_elsewhere: bool = False):
        super().__init__()
        self.is_kept, self.is_elsewhere = is_kept, is_elsewhere

    def end_elsewhere(self) -> None:
        """Raise a SaidElsewhere on the nodes without a signal, so that torchrun restarts them.

        With status 0, torchrun would take their part for finished and wait for the other node.
        """
        if self.is_elsewhere:
            raise SaidElsewhere(1)


class Blocked(BaseException):
    """Interrupts a wait after a signal.

    It is no Exception, so that the interrupted code does not handle it as one of its errors.
    """


class Signals:
    """Remembers, while entered, that SIGTERM, SIGUSR1 or SIGHUP has come; a second one ends the process."""

    received: int | None = None
    patience: float | None = None  # seconds, while in `waiting`

    def __enter__(self):
        # A signal that is ignored stays ignored, such as SIGHUP under nohup.
        numbers = [each for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._receive) for number in numbers}
        self.alarm_before = signal.signal(signal.SIGALRM, self._give_up)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGALRM, self.alarm_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self, patience: float) -> Iterator[None]:
        """Encloses code that may wait forever, for instance for a file that hangs.

        Raises:
            Blocked: It still waits ``patience`` seconds after a signal.
        """
        self.patience = patience
        if self.received is not None:
            self._set_alarm()
        try:
            yield
        finally:
            self.patience = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _receive(self, number, frame):
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if self.patience is not None:
            self._set_alarm()

    def _set_alarm(self):
        signal.setitimer(signal.ITIMER_REAL, self.patience)

    def _give_up(self, number, frame):
        if self.patience is not None:
            raise Blocked


@contextlib.contextmanager
def obeying(signals: Signals, world: World) -> Iterator[None]:
    """Inside, a signal interrupts waiting for data.

    Raises:
        Stopped: This process is alone; nothing is saved.
        RunError: Others wait for this process, so no state can be saved.
    """
    try:
        with signals.waiting(PATIENCE_ALONE if world.size == 1 else PATIENCE_OF_MANY):
            yield
        return
    except Blocked:
        end_loaders()
    if world.size == 1:
        raise Stopped(is_kept=True)
    error = RunError(
        f"stopped by a signal while process {world.rank} waited for its data; the last training "
        "state is kept. Check that the data can be read, then resume with --resume auto"
    )
    error.of_one_rank = True
    raise error


def end_loaders() -> None:
    """End this process's loader processes, which may be blocked and ignore the signals to stop."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises for every worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
