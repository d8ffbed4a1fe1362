"""When a run's state reaches the disk, in which files, and which of them a later run can trust."""

import signal
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from t2tvit.errors import InputError
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World, gather, min_over_ranks, on_main
from t2tvit.training.form import check_state
from t2tvit.training.state import TrainState, read_tensors, rng_state, write_tensors

STATE_FILES = "state-*.safetensors"
CONTENT_KEY, TENSOR_KEY = "t2tvit_state", "__tensor__"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# On a GPU the ranks agree on what to do only so often: each time waits for all work queued there.
AGREE_EVERY = 10


class Stopped(Exception):
    """A signal asked the run to end; its state is on the disk."""


class Signals:
    """Remembers, while entered, that SIGTERM, SIGUSR1 or SIGHUP has come; a second one ends the process."""

    received: int | None = None

    def __enter__(self):
        # A signal that is ignored stays ignored, such as SIGHUP under nohup.
        numbers = [each for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)


class Keeper:
    """Writes a run's state into ``output``, and decides when, with one mind over all ranks.

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
        self.saved = time.monotonic()
        self.agree_every = AGREE_EVERY if world.device.type == "cuda" else 1

    def after_step(self, state: TrainState) -> None:
        """Save if it is time to, or if any rank has been asked to stop.

        While updates are skipped, only a request to stop saves a state.

        Raises:
            Stopped: after saving, on every rank.
            RunError: the disk is full, or the folder not to be written to.
        """
        if state.step % self.agree_every:
            return
        minutes = (time.monotonic() - self.saved) / 60
        go_on = [self.signals.received is None, minutes < self.config.checkpoint_minutes]
        go_on = min_over_ranks(
            self.world, torch.tensor(go_on, dtype=torch.int32, device=self.world.device)
        )
        stays, is_recent = go_on.tolist()
        if not stays or not is_recent and not state.skipped_in_a_row:
            self.save(state)
        if not stays:
            raise Stopped

    def during_evaluation(self, state: TrainState) -> None:
        """Save if this process is alone and has been asked to stop.

        Several have different numbers of batches to evaluate; they stop after the next update.

        Raises:
            Stopped: after saving.
        """
        if self.world.size == 1 and self.signals.received is not None:
            self.save(state)
            raise Stopped

    def save(self, state: TrainState) -> None:
        """Write the state as the newest file and remove the oldest beyond ``keep_checkpoints``."""
        ranks = gather(
            self.world,
            {
                "rng": rng_state(self.world.device),
                "loss_sum": float(state.loss_sum),
                "images": state.images,
                "unreadable": sorted(state.unreadable),
            },
        )
        on_main(self.world, lambda: self._write(state, ranks))
        self.saved = time.monotonic()

    def _write(self, state: TrainState, ranks: list[dict]) -> None:
        content = {
            "state": state.state_dict(),
            "ranks": ranks,
            "config": vars(self.config),
            "class_names": self.class_names,
            "images": self.images,
        }
        write_state(self.output / state_name(state.epochs_done, state.step), content)
        remove_oldest(self.output, self.config.keep_checkpoints)


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

