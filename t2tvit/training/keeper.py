"""When a run's state reaches the disk, in which files, and which of them a later run can trust."""

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor

from t2tvit.errors import InputError, RunError, SaidElsewhere
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.form import check_state
from t2tvit.training.state import TrainState, read_tensors, rng_state, write_tensors

STATE_FILES = "state-*.safetensors"
CONTENT_KEY, TENSOR_KEY = "t2tvit_state", "__tensor__"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# On a GPU the ranks agree on what to do only so often: each time waits for all work queued there.
AGREE_EVERY = 10
# While they evaluate, each of them looks for a signal of another's so often, in seconds.
ASK_EVERY = 0.5
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
    """A signal has come, and what the process waits for does not.

    Not an Exception, or the code that it interrupts would take it for an error of its own.
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
        """What may wait for ever, such as for a file that hangs.

        Raises:
            Blocked: it still waits, ``patience`` seconds after a signal.
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
    """What waits for data inside does not hold up a signal.

    Raises:
        Stopped: this process is alone; nothing is saved.
        RunError: others wait for this process, so that no state can be saved.
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


class Keeper:
    """Writes a run's state into ``output``; all ranks agree on when to save.

    No state is saved while updates are skipped: the states from before are the ones to resume from.

    Args:
        output: the run's folder.
        config: ``checkpoint_minutes`` and ``keep_checkpoints`` are followed, all is stored.
        class_names: those of the data, in order.
        images: what describes them, see :func:`t2tvit.training.identity.described`; stored.
        world: every rank calls the same methods in the same order.
        signals: entered.
    """

    def __init__(
        self,
        output: Path,
        config: RunConfig,
        class_names: list[str],
        images: dict[str, dict],
        world: World,
        signals: Signals,
    ):
        self.output, self.config, self.class_names = output, config, class_names
        self.images, self.world, self.signals = images, world, signals
        self.saved = self.asked = time.monotonic()
        self.newest: Path | None = None  # that this process has saved
        self.passing: Path | None = None  # the state before an evaluation, until the next one
        self.is_kept = False  # the state before the evaluation at hand
        self.is_stopping = False
        self.agree_every = AGREE_EVERY if world.device.type == "cuda" else 1

    def after_step(self, state: TrainState) -> None:
        """Save if it is time to, or if any rank has been asked to stop.

        Raises:
            Stopped: after saving, on every rank.
            RunError: the disk is full, or the folder not to be written to.
        """
        if state.step % self.agree_every:
            return
        minutes = (time.monotonic() - self.saved) / 60
        stays, is_recent = self._all_agree(
            self.signals.received is None, minutes < self.config.checkpoint_minutes
        )
        if not stays:
            self.stop(state)
        if not is_recent and not state.skipped_in_a_row:
            self.save(state)

    def after_epoch(self, state: TrainState) -> None:
        """Save the state, in place of the one before the evaluation; while updates are skipped,
        after the next one that is not."""
        if not self._save_if_sound(state):
            self.saved = -math.inf

    def before_evaluation(self, state: TrainState) -> None:
        """Save the state of the last update, as an evaluation can take long."""
        self.is_kept = not state.skipped_in_a_row
        if self.is_kept and self.newest != self._path(state):
            minutes = (time.monotonic() - self.saved) / 60
            self.save(state, passes=minutes < self.config.checkpoint_minutes)

    def until_stopped(self, batches: Iterator) -> Iterator:
        """``batches``, until any rank has been asked to stop; then :meth:`after_evaluation` ends
        the run on all, whose numbers of batches differ."""
        while not self.is_stopping:
            try:
                with self.signals.waiting(PATIENCE_ALONE):
                    batch = next(batches)
            except StopIteration:
                return
            except Blocked:
                end_loaders()
                self._ask()
                return
            yield batch
            self._ask()

    def after_evaluation(self) -> None:
        """End the run if any rank has been asked to stop; the state from before is on the disk.

        Raises:
            Stopped: on every rank.
        """
        (stays,) = self._all_agree(self.signals.received is None)
        if not stays:
            self._leave(self.is_kept)

    @contextlib.contextmanager
    def waiting(self, state: TrainState) -> Iterator[None]:
        """Waiting for the next training batch does not hold up a signal.

        Raises:
            Stopped: this process is alone, and has saved its state.
            RunError: the others wait for this process, so that no state can be saved.
        """
        try:
            with obeying(self.signals, self.world):
                yield
        except Stopped:
            self.stop(state)

    def stop(self, state: TrainState) -> NoReturn:
        """Save the state and end the run on every rank.

        Raises:
            Stopped: always.
        """
        self._leave(self._save_if_sound(state))

    def save(self, state: TrainState, passes: bool = False) -> None:
        """Write the state as the newest file and remove the oldest beyond ``keep_checkpoints``.

        A state that ``passes`` is not counted, and the next one replaces it.
        """
        ranks = self.world.gather(
            {
                "rng": rng_state(self.world.device),
                "loss_sum": float(state.loss_sum),
                "images": state.images,
                "unreadable": sorted(state.unreadable),
            },
        )
        self.world.on_main(lambda: self._write(state, ranks, passes))
        self.saved = time.monotonic()
        self.newest = self._path(state)

    def _save_if_sound(self, state: TrainState) -> bool:
        """Save the state, unless updates are being skipped; whether it has been saved."""
        if state.skipped_in_a_row:
            self.world.say(
                f"warning   no training state is saved now, as the last {state.skipped_in_a_row} "
                "updates were skipped; the states from before are kept",
            )
            return False
        self.save(state)
        return True

    def _leave(self, is_kept: bool) -> NoReturn:
        """Raise :class:`Stopped` on every rank."""
        node = os.environ.get("GROUP_RANK")
        signalled = self.world.gather(node if self.signals.received is not None else None)
        raise Stopped(is_kept, is_elsewhere=node is not None and node not in signalled)

    def _ask(self) -> None:
        """Tell the other ranks of a signal, and learn now and then of theirs."""
        if self.signals.received is not None:
            self.is_stopping = True
            if self.world.size > 1:
                self.world.store.set("stop", "")
        elif self.world.size > 1 and time.monotonic() - self.asked > ASK_EVERY:
            self.asked = time.monotonic()
            self.is_stopping = self.world.store.check(["stop"])

    def _all_agree(self, *answers: bool) -> list[bool]:
        """For each question, whether every rank answers yes."""
        votes = torch.tensor(answers, dtype=torch.int32, device=self.world.device)
        return [bool(vote) for vote in self.world.minimum(votes).tolist()]

    def _path(self, state: TrainState) -> Path:
        return self.output / state_name(state.epochs_done, state.step)

    def _write(self, state: TrainState, ranks: list[dict], passes: bool) -> None:
        content = {
            "state": state.state_dict(),
            "ranks": ranks,
            "config": vars(self.config),
            "class_names": self.class_names,
            "images": self.images,
        }
        path = self._path(state)
        write_state(path, content)
        if self.passing is not None:
            self.passing.unlink(missing_ok=True)
        self.passing = path if passes else None
        remove_oldest(self.output, self.config.keep_checkpoints + passes)


def end_loaders() -> None:
    """End this process's loader processes, which may be blocked and ignore the signals to stop."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises for every worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def state_name(epochs_done: int, step: int) -> str:
    """The name of a state's file; names sort as the states follow each other."""
    return f"state-{epochs_done:05d}-{step:08d}.safetensors"


def states_in(output: Path) -> list[Path]:
    """The files of training states, the newest first."""
    return sorted(output.glob(STATE_FILES), reverse=True)


def remove_oldest(output: Path, keep: int) -> None:
    """Remove all training states but the ``keep`` newest."""
    for path in states_in(output)[keep:]:
        path.unlink()


def find_state(output: Path) -> tuple[Path | None, list[str]]:
    """The newest state that can be trusted, and why each newer one cannot.

    Raises:
        InputError: there are states, and all are damaged.
    """
    damaged = []
    for path in states_in(output):
        try:
            read_resumable(path)
        except InputError as error:
            damaged.append(str(error))
            continue
        return path, damaged
    if damaged:
        raise InputError(
            f"every training state in {output} is damaged: {'; '.join(damaged)}"
        )
    return None, []


def write_state(path: Path, content: dict) -> None:
    """Write nested lists and dicts with tensors as safetensors: tensors, and the rest as JSON."""
    tensors = {}
    content = _take_tensors(content, "", tensors)
    write_tensors(path, tensors, CONTENT_KEY, content)


def read_state(path: Path) -> dict:
    """The content of :func:`write_state`, on the CPU; its keys are text.

    Raises:
        InputError: the file is missing, damaged, or no training state.
    """
    try:
        content, tensors = read_tensors(path, CONTENT_KEY)
        if content is not None:
            content = _put_tensors(content, tensors)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; is it the output of a run?") from None
    except (KeyError, RecursionError, SafetensorError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"training state {path} is damaged ({reason})") from None
    if content is None:
        raise InputError(f"{path} is no training state; --resume takes a run's {STATE_FILES}")
    return content


def read_resumable(path: Path) -> dict:
    """:func:`read_state`, with the form of a state that a run can resume from.

    Raises:
        InputError: see there, or the content has another form.
    """
    content = read_state(path)
    try:
        check_state(content)
    except ValueError as error:
        raise InputError(f"training state {path} is damaged ({error})") from None
    return content


def _take_tensors(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """``value`` with each tensor replaced by its name in ``tensors``, where it is put."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {TENSOR_KEY: name}
    if isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
        return {key: _take_tensors(item, f"{name}.{key}", tensors) for key, item in items}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: object, tensors: dict[str, Tensor]) -> object:
    """The inverse of :func:`_take_tensors`."""
    if isinstance(value, dict):
        if TENSOR_KEY in value:
            return tensors[value[TENSOR_KEY]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value

