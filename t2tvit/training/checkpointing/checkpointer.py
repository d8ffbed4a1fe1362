"""Saving the states and weights of a run."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from t2tvit.training.checkpointing.file_names import BEST_FILE, LAST_FILE, NOT_FINITE_FILES
from t2tvit.training.checkpointing.states import remove_oldest, state_name, write_state
from t2tvit.training.checkpointing.weights import Weights, save_weights
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.randomness import rng_state
from t2tvit.training.stopping import (
    PATIENCE_ALONE,
    Blocked,
    Signals,
    Stopped,
    end_loaders,
    obeying,
)

if TYPE_CHECKING:
    from t2tvit.training.trainer import Trainer

# Steps between agreements of the ranks on a GPU; each one waits for all work queued there.
AGREE_EVERY = 10
# During an evaluation, the seconds after which each rank checks whether another one got a signal.
ASK_EVERY = 0.5


class Checkpointer:
    """Writes a run's states and weights into ``output``; all ranks agree on when.

    No state is saved while updates are skipped, so that a run never resumes from a diverging model.
    The methods take the trainer whose state they write.

    Args:
        output: The run's folder.
        config: The configuration as given, which is stored. Its ``checkpoint_minutes`` and
            ``keep_checkpoints`` say when to save and how many states to keep.
        about: The description for files of weights, without epoch and top-1.
        images: The description of the images to store, see :func:`.identity.described`.
        world: The processes of the run. All ranks call the same methods in the same order.
        signals: An entered context manager.
    """

    def __init__(
        self,
        output: Path,
        config: RunConfig,
        about: Weights,
        images: dict[str, dict],
        world: World,
        signals: Signals,
    ):
        self.output, self.config, self.about = output, config, about
        self.images, self.world, self.signals = images, world, signals
        self.saved = self.asked = time.monotonic()
        self.newest: Path | None = None  # state that this process has saved
        self.passing: Path | None = None  # the state before an evaluation, until the next one
        self.is_kept = False  # whether the state before the current evaluation is saved
        self.is_stopping = False
        self.agree_every = AGREE_EVERY if world.device.type == "cuda" else 1

    def identity(self) -> dict:
        """The description of the run in RUN_FILE: configuration, classes and images."""
        return {
            "config": asdict(self.config),
            "class_names": self.about.class_names,
            "images": self.images,
        }

    def after_step(self, trainer: "Trainer") -> None:
        """Save the state if it is due or if any rank has been asked to stop.

        Raises:
            Stopped: After saving, on every rank.
            RunError: The disk is full, or the folder cannot be written to.
        """
        if trainer.step % self.agree_every:
            return
        minutes = (time.monotonic() - self.saved) / 60
        stays, is_recent = self._all_agree(
            self.signals.received is None, minutes < self.config.checkpoint_minutes
        )
        if not stays:
            self.stop(trainer)
        if not is_recent and not trainer.skipped_in_a_row:
            self.save(trainer)

    def after_epoch(self, trainer: "Trainer") -> None:
        """Save the state, which replaces that from before the evaluation.

        If the last update was skipped, the state is saved after the next one that is not skipped.
        """
        if not self._save_if_sound(trainer):
            self.saved = -math.inf

    def keep_weights(self, trainer: "Trainer", is_best: bool) -> None:
        """Write the weights of the completed epoch."""
        metrics = trainer.history[-1]
        about = replace(self.about, epoch=metrics["epoch"], top1=metrics["top1"])
        for name in (BEST_FILE, LAST_FILE) if is_best else (LAST_FILE,):
            weights = (trainer.evaluated_model, self.output / name, about)
            self.world.on_main(lambda: save_weights(*weights))

    def keep_batch(self, trainer: "Trainer", batch: dict) -> None:
        """Write this rank's ``batch``, whose loss is not finite, and the current weights."""
        path = self.output / NOT_FINITE_FILES.replace("*", str(self.world.rank))
        write_state(path, batch | {"model": trainer.model.state_dict()})

    def before_evaluation(self, trainer: "Trainer") -> None:
        """Save the state, because an evaluation can take long."""
        self.is_kept = not trainer.skipped_in_a_row
        if self.is_kept and self.newest != self._path(trainer):
            minutes = (time.monotonic() - self.saved) / 60
            self.save(trainer, passes=minutes < self.config.checkpoint_minutes)

    def until_stopped(self, batches: Iterator) -> Iterator:
        """``batches``, until any rank has been asked to stop.

        The ranks may stop at different batches; :meth:`after_evaluation` then ends the run on all.
        """
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
        """End the run if any rank has been asked to stop; the last state is already saved.

        Raises:
            Stopped: On every rank.
        """
        (stays,) = self._all_agree(self.signals.received is None)
        if not stays:
            self._leave(self.is_kept)

    @contextlib.contextmanager
    def waiting(self, trainer: "Trainer") -> Iterator[None]:
        """A context in which a signal interrupts the wait for the next training batch.

        Raises:
            Stopped: There is only this process, and it has saved its state.
            RunError: Other processes wait for this one, so no state can be saved.
        """
        try:
            with obeying(self.signals, self.world):
                yield
        except Stopped:
            self.stop(trainer)

    def stop(self, trainer: "Trainer") -> NoReturn:
        """Save the state and end the run on every rank.

        Raises:
            Stopped: Always.
        """
        self._leave(self._save_if_sound(trainer))

    def save(self, trainer: "Trainer", passes: bool = False) -> None:
        """Write the state as the newest file and remove the oldest beyond ``keep_checkpoints``.

        If it ``passes``, it does not count, and the next state replaces it.
        """
        ranks = self.world.gather(
            {
                "rng": rng_state(self.world.device),
                "loss_sum": float(trainer.loss_sum),
                "images": trainer.images,
                "unreadable": sorted(trainer.unreadable),
            }
        )
        self.world.on_main(lambda: self._write(trainer, ranks, passes))
        self.saved = time.monotonic()
        self.newest = self._path(trainer)

    def _save_if_sound(self, trainer: "Trainer") -> bool:
        """Save the state unless the last update was skipped; returns whether it was saved."""
        if trainer.skipped_in_a_row:
            self.world.say(
                f"warning   no training state is saved now, because the last {trainer.skipped_in_a_row} "
                "updates were skipped; earlier states are kept",
            )
            return False
        self.save(trainer)
        return True

    def _leave(self, is_kept: bool) -> NoReturn:
        """Raise :class:`Stopped` on every rank."""
        node = os.environ.get("GROUP_RANK")
        signalled = self.world.gather(node if self.signals.received is not None else None)
        raise Stopped(is_kept, is_elsewhere=node is not None and node not in signalled)

    def _ask(self) -> None:
        """Tell the other ranks about a signal; from time to time, check for theirs."""
        if self.signals.received is not None:
            self.is_stopping = True
            if self.world.size > 1:
                self.world.shared.set("stop", "")
        elif self.world.size > 1 and time.monotonic() - self.asked > ASK_EVERY:
            self.asked = time.monotonic()
            self.is_stopping = self.world.shared.check(["stop"])

    def _all_agree(self, *answers: bool) -> list[bool]:
        """For each question, whether every rank answers yes."""
        votes = torch.tensor(answers, dtype=torch.int32, device=self.world.device)
        return [bool(vote) for vote in self.world.minimum(votes).tolist()]

    def _path(self, trainer: "Trainer") -> Path:
        return self.output / state_name(trainer.epochs_done, trainer.step)

    def _write(self, trainer: "Trainer", ranks: list[dict], passes: bool) -> None:
        content = {
            "state": trainer.state_dict(),
            "ranks": ranks,
            "config": vars(self.config),
            "class_names": self.about.class_names,
            "images": self.images,
        }
        path = self._path(trainer)
        write_state(path, content)
        if self.passing is not None:
            self.passing.unlink(missing_ok=True)
        self.passing = path if passes else None
        remove_oldest(self.output, self.config.keep_checkpoints + passes)
