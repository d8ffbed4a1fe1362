"""The folder of a run: its owner, its lock, its record, and how to resume it."""

import contextlib
import fcntl
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from t2tvit.data.sources import Split
from t2tvit.errors import InputError
from t2tvit.files import WRITING, read_bytes, read_text, set_aside, write_atomically
from t2tvit.training.checkpointing.file_names import CONFIG_FILE, METRICS_FILE, RUN_FILE
from t2tvit.training.checkpointing.identity import (
    MAY_CHANGE,
    REMEDIES,
    check_data,
    check_owner,
    described,
    difference,
    is_identity,
)
from t2tvit.training.checkpointing.rewind import Fitting, fitting, rewind
from t2tvit.training.checkpointing.states import (
    find_state,
    read_resumable,
    remove_oldest,
    state_name,
    states_in,
    write_state,
)
from t2tvit.training.checkpointing.weights import Weights
from t2tvit.training.config import RunConfig, from_dict, resolve
from t2tvit.training.environment import describe_device, git_commit, versions

if TYPE_CHECKING:
    from t2tvit.training.checkpointing.checkpointer import Checkpointer
    from t2tvit.training.trainer import Trainer

LOCK_PATIENCE = 10  # seconds; the loader processes of a killed run hold its lock until they end


@dataclass(frozen=True)
class RunFolder:
    """The folder that a run writes to, and the training state that it resumes from; a context manager.

    Attributes:
        output: The folder.
        resume: The value of ``--resume``.
        state_path: The file of the state to resume from; None for a new run.
        damaged: Why newer states cannot be read.
        before: The :func:`listing` of ``output`` when it was examined.
        lock: Held from :meth:`claim` to the end of the context.
    """

    output: Path
    resume: str | None
    state_path: Path | None
    damaged: list[str]
    before: tuple
    lock: contextlib.ExitStack = field(
        default_factory=contextlib.ExitStack, compare=False, repr=False
    )

    @classmethod
    def find(cls, output: Path | None, resume: str | None) -> "RunFolder":
        """The folder that ``--output`` and ``--resume`` determine.

        Raises:
            InputError: There is no folder to write to, or no state that can be read.
        """
        source = None if resume in (None, "auto") else Path(resume)
        if source is not None:
            output = output or (source if source.is_dir() else source.parent)
        if output is None:
            raise InputError("--output: got none, expected a folder for the run's files")
        before = listing(output)  # before anything there is read
        if source is not None and source.is_file():
            return cls(output, resume, source, [], before)
        path, damaged = (None, []) if resume is None else find_state(source or output)
        if source is not None and path is None:
            raise InputError(f"--resume: {resume} does not exist or holds no training state")
        if resume == "auto" and path is None:
            beginning = read_record(output).get("beginning")
            if beginning is not None and beginning["state"] is not None:
                path = Path(beginning["state"])  # interrupted before it was copied
        return cls(output, resume, path, damaged, before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lock.close()

    @property
    def resumed_path(self) -> Path:
        """The file of the state to resume from; only if there is one."""
        assert self.state_path is not None, "a new run resumes from no state"
        return self.state_path

    @property
    def moves(self) -> bool:
        """Whether the state to resume is in another folder than ``output``."""
        source = self.state_path
        return source is not None and source.parent.resolve() != self.output.resolve()

    @property
    def owner(self) -> dict | None:
        """The :meth:`.Checkpointer.identity` in the folder of the state to resume, if any."""
        return read_record(self.resumed_path.parent).get("identity")

    def read(self) -> dict | None:
        """The content of the state to resume; None for a new run.

        Raises:
            InputError: The state is damaged.
        """
        return None if self.state_path is None else read_resumable(self.state_path)

    def check_owner(self, resumed: dict) -> None:
        """Raise an InputError if the state ``resumed`` does not belong to the run of its folder."""
        check_owner(self.resumed_path, resumed, self.owner)

    def choose_config(self, name: str | None, overrides: dict) -> RunConfig:
        """The configuration of a new or resumed run.

        Args:
            name: A YAML file or packaged configuration. If None, a resumed run keeps its own, and a
                new run uses ``digits`` if the data is digits or not given, else the defaults.
            overrides: The keys that options set.

        Raises:
            InputError: The configuration is invalid, or changes a key that a resumed run cannot
                change: all but MAY_CHANGE, and REMEDIES if they are in ``overrides``.
        """
        if self.state_path is None:
            if name is None and self.resume == "auto":  # interrupted before its first checkpoint
                beginning = read_record(self.output).get("beginning")
                if beginning is not None:
                    return from_dict(beginning["config"], overrides)
                if (self.output / CONFIG_FILE).exists():
                    name = self.output / CONFIG_FILE
                elif "data" not in overrides and any(self.output.glob(WRITING)):
                    raise InputError(
                        f"--resume auto: a start was interrupted in {self.output} before its first "
                        "file was complete, and its options are lost; give them again"
                    )
            if name is None and overrides.get("data", "digits").partition(":")[0] == "digits":
                name = "digits"
            return resolve(name, overrides)
        before = read_resumable(self.state_path)["config"]
        own = before | (self._started_with(before) if self.resume == "auto" else {})
        config = resolve(name, overrides) if name is not None else from_dict(own, overrides)
        may_change = MAY_CHANGE | (REMEDIES & overrides.keys())
        found = difference(config, from_dict(own), may_change)
        if found is not None:
            key, new, old = found
            option = f"--{key.replace('_', '-')} {'none' if new is None else new}"
            change = f"give {option} to change it" if key in REMEDIES else "do not change it"
            raise InputError(
                f"{key}: got {new}, but the run to resume has {old}; {change}, or start another run "
                "with another --output"
            )
        return config

    def _started_with(self, before: dict) -> dict:
        """The keys that the last start in ``output`` changed since ``before``, the state's config.

        Empty if the state belongs to another run, which :meth:`check_owner` reports.
        """
        record = read_record(self.output)
        if record.get("beginning") is not None:
            return record["beginning"]["config"]
        config = record["identity"]["config"] if "identity" in record else before
        if difference(from_dict(before), from_dict(config), MAY_CHANGE | REMEDIES) is not None:
            return {}
        return {key: config[key] for key in ("epochs", *REMEDIES) if key in config}

    def check(self) -> None:
        """Raise an InputError if the output folder contains anything but the run to resume."""
        output = self.output
        try:
            if not output.exists() or all(path.match(WRITING) for path in output.iterdir()):
                return
        except OSError as error:
            raise InputError(
                f"--output {output}: {error.strerror}; choose another folder"
            ) from None
        if self.resume is None:
            raise InputError(
                f"--output {output} is not empty; resume its run with --resume auto, or choose "
                "another --output"
            )
        record = read_record(output)
        if self.moves:
            state = (record.get("beginning") or {}).get("state")
            source = self.resumed_path.parent.resolve()
            is_known = state is not None and Path(state).parent == source
        else:
            is_known = self.state_path is not None or record
        if not is_known:
            own = " (to resume the run there, give --resume auto)" if record else ""
            raise InputError(
                f"--output {output} is not empty and does not hold the run to resume; choose another "
                f"--output{own}"
            )

    def described_images(
        self, splits: tuple[Split, Split], resumed: dict | None
    ) -> dict[str, dict]:
        """The :func:`described` images; raises an InputError if the run to resume had others."""
        images = described(splits)
        if resumed is not None:
            before = resumed.get("images") or (self.owner or {}).get("images")
            check_data(splits[0].class_names, images, self.resumed_path, resumed, before)
        return images

    def claim(self, checkpointer: "Checkpointer", resumed: dict | None) -> tuple[int, list[str]]:
        """Create and lock the output folder, and fit its files to the state to resume.

        Until :meth:`record_start`, RUN_FILE says how to repeat the start.

        Args:
            checkpointer: The run's checkpointer.
            resumed: The result of :meth:`read`.

        Returns:
            The epoch of the weights in BEST_FILE, 0 if there are none, and log lines about renamed
            files.
        """
        output, about = self.output, checkpointer.about
        copied = None
        if resumed is not None and self.moves:  # read before anything is written
            copied = fitting(self.resumed_path, resumed, about, moves=True)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output {output}: {error.strerror}; choose another folder"
            ) from None
        self.lock.enter_context(locked(output))
        self.check()  # another run may have started there in the meantime
        if listing(output) != self.before:
            raise InputError(f"--output {output}: another run has just written there; try again")
        for leftover in output.glob(WRITING):  # of a run that was killed
            leftover.unlink()
        if self.state_path is None or self.moves:
            self._record_beginning(checkpointer.identity())
        if resumed is None:
            return 0, []
        best, lines = self._fit(resumed, about, copied)
        remove_oldest(output, checkpointer.config.keep_checkpoints)
        return best, lines

    def _record_beginning(self, owner: dict) -> None:
        """Write to RUN_FILE how to repeat a start that is interrupted."""
        path = self.resumed_path if self.moves else None
        state = None if path is None else str(path.parent.resolve() / path.name)
        beginning = {"state": state, "config": owner["config"]}
        record = {"starts": []} | read_record(self.output)
        record |= {"beginning": beginning, "identity": owner}
        write_atomically(self.output / RUN_FILE, json.dumps(record, indent=2) + "\n")

    def _fit(self, resumed: dict, about: Weights, copied: Fitting | None) -> tuple[int, list[str]]:
        """Fit the folder to the state ``resumed``; ``copied`` are files from the state's own folder."""
        output = self.output
        state = output / state_name(resumed["state"]["epochs_done"], resumed["state"]["step"])
        if copied is not None:
            replace_files(output, copied.files)
        if self.resumed_path.resolve() != state.resolve():
            write_state(state, resumed)  # with the name that --resume auto looks for
        fits = fitting(state, resumed, about)
        lines = [*(copied or fits).lines]
        lines += rewind(output, resumed["state"], fits.strange)
        replace_files(output, fits.files)
        return fits.best, lines

    def record_start(self, trainer: "Trainer") -> None:
        """Write the configuration, the record of this start, and the metrics of completed epochs."""
        world, checkpointer = trainer.world, trainer.own_checkpointer
        write_atomically(self.output / CONFIG_FILE, checkpointer.config.to_yaml())
        path = self.output / RUN_FILE
        record = read_record(self.output)
        if not record and os.path.lexists(path):
            aside = set_aside(path)
            world.say(f"warning   {path} is not the record of a run; renamed to {aside.name}")
        start = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "epochs_done": trainer.epochs_done,
            "step": trainer.step,
            "world_size": world.size,
            "device": describe_device(world.device),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        record = {
            "class_names": checkpointer.about.class_names,
            "identity": checkpointer.identity(),
            "starts": [*record.get("starts", []), start],
        }
        write_metrics(self.output / METRICS_FILE, trainer.history)
        # Last, as it marks the start as complete.
        write_atomically(path, json.dumps(record, indent=2) + "\n")


def listing(output: Path) -> tuple:
    """The states and RUN_FILE of a folder, which change whenever a run starts or saves there."""
    try:
        record = read_bytes(output / RUN_FILE)
    except OSError:
        record = None
    return [path.name for path in states_in(output)], record


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files, given by name, into ``folder``."""
    for name, content in contents.items():
        write_atomically(folder / name, content)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock the folder for this process, if its file system supports that.

    Raises:
        InputError: Another process holds the lock.
    """
    folder = os.open(output, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"--output {output}: another run is writing there; choose another folder"
                    ) from None
                time.sleep(0.2)
            except OSError:  # not supported, as for folders over NFS
                break
        yield
    finally:
        os.close(folder)


def read_record(output: Path) -> dict:
    """The content of RUN_FILE: ``starts``, ``identity`` (see :meth:`.Checkpointer.identity`; missing
    in the earlier format), and ``beginning`` until the first start is complete.

    Empty if the file is missing, damaged or from another program.
    """
    try:
        record = json.loads(read_text(output / RUN_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("starts"), list):
        return {}
    beginning = record.get("beginning")
    if beginning is not None and not (
        isinstance(beginning, dict)
        and isinstance(beginning.get("state", 0), str | None)
        and isinstance(beginning.get("config"), dict)
    ):
        return {}
    if "identity" in record and not is_identity(record["identity"]):
        return {}
    return record


def write_metrics(path: Path, history: list[dict]) -> None:
    """Write one JSON object per epoch and line. Non-finite values are null, because JSON has no NaN."""
    rows = (
        {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for metrics in history
    )
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
