"""Signals that stop a run, even while it waits for data."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator

from t2tvit.errors import RunError, SaidElsewhere
from t2tvit.training.distributed import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# How long a process that was asked to stop waits for its next batch, in seconds. A single process
# can save its state without waiting. One of many cannot, so it waits for a slow loader, but less than
# the 30 seconds after which torchrun kills it.
PATIENCE_ALONE, PATIENCE_OF_MANY = 0.5, 15.0


class Stopped(Exception):
    """A signal asked the run to end.

    ``is_kept``: the last update is saved, not only an earlier state. ``is_elsewhere``: the signal was
    sent to another torchrun node, not to this one.
    """

    def __init__(self, is_kept: bool, is_elsewhere: bool = False):
        super().__init__()
        self.is_kept, self.is_elsewhere = is_kept, is_elsewhere

    def end_elsewhere(self) -> None:
        """Raise a SaidElsewhere on the nodes without a signal, so that torchrun restarts them.

        With status 0, torchrun would consider them finished and wait for the other node.
        """
        if self.is_elsewhere:
            raise SaidElsewhere(1)


class Blocked(BaseException):
    """Interrupts a wait after a signal.

    It is not an Exception, so that the interrupted code does not handle it.
    """


class Signals:
    """A context that records SIGTERM, SIGUSR1 and SIGHUP; a second signal ends the process."""

    received: int | None = None
    patience: float | None = None  # seconds, inside `waiting`

    def __enter__(self):
        # Ignored signals stay ignored, such as SIGHUP under nohup.
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
        """A context for code that may wait forever, for instance for a file that hangs.

        Raises:
            Blocked: The code still waits ``patience`` seconds after a signal.
        """
        self.patience = patience
        if self.received is not None:
            self._set_alarm(patience)
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
            self._set_alarm(self.patience)

    def _set_alarm(self, seconds: float):
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _give_up(self, number, frame):
        if self.patience is not None:
            raise Blocked


@contextlib.contextmanager
def obeying(signals: Signals, world: World) -> Iterator[None]:
    """A context in which a signal interrupts waiting for data.

    Raises:
        Stopped: There is only this process; nothing is saved.
        RunError: Other processes wait for this one, so no state can be saved.
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
    """Kill this process's loader processes, which may be blocked and ignore signals to stop."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises for every worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
