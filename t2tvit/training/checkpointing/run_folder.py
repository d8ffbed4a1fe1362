"""The folder of a run: which run it holds, how to resume it, its lock and its record."""

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
    from t2tvit.training.trainer import Trainer

LOCK_PATIENCE = 10  # seconds; the loader processes of a killed run hold its lock until they end


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the training state that it resumes from, if any; a context manager.

    Attributes:
        output: the folder.
        resume: what ``--resume`` said.
        state_path: the file of the state to resume from.
        damaged: why newer states cannot be read.
        before: the :func:`listing` of ``output``.
        lock: held from :meth:`claim` to the end of the context.
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
        """What ``--output`` and ``--resume`` mean.

        Raises:
            InputError: they mean no folder, or no state that can be read.
        """
        source = None if resume in (None, "auto") else Path(resume)
        if source is not None:
            output = output or (source if source.is_dir() else source.parent)
        if output is None:
            raise InputError("--output: none given; name the folder that the run may write to")
        before = listing(output)  # before any of it is read
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
    def moves(self) -> bool:
        """Whether the run resumes in another folder than the state's."""
        source = self.state_path
        return source is not None and source.parent.resolve() != self.output.resolve()

    @property
    def owner(self) -> dict | None:
        """The :meth:`.Checkpointer.identity` that the folder of the state to resume has, if any."""
        return read_record(self.state_path.parent).get("identity")

    def read(self) -> dict | None:
        """The content of the state to resume; None for a new run.

        Raises:
            InputError: it is damaged.
        """
        return None if self.state_path is None else read_resumable(self.state_path)

    def check_owner(self, resumed: dict) -> None:
        """Raise an InputError if the state ``resumed`` is of another run than its folder's."""
        check_owner(self.state_path, resumed, self.owner)

    def choose_config(self, name: str | None, overrides: dict) -> RunConfig:
        """The configuration of a new or resumed run.

        A resumed run may change the keys in MAY_CHANGE, and those in REMEDIES that ``overrides`` sets.
        Without ``name``, it keeps its own configuration. A new run without ``name`` uses the packaged
        ``digits`` if its data are the digits or not given.
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
            change = f"give {option} to change it" if key in REMEDIES else "leave it"
            raise InputError(
                f"{key}: got {new}, but the run to resume has {old}; {change}, or start another run "
                "with another --output"
            )
        return config

    def _started_with(self, before: dict) -> dict:
        """The keys that the last start in ``output`` changed, and the state's config ``before`` lacks.

        None if the state is of another run, which :func:`check_owner` reports.
        """
        record = read_record(self.output)
        if record.get("beginning") is not None:
            return record["beginning"]["config"]
        config = record["identity"]["config"] if "identity" in record else before
        if difference(from_dict(before), from_dict(config), MAY_CHANGE | REMEDIES) is not None:
            return {}
        return {key: config[key] for key in ("epochs", *REMEDIES) if key in config}

    def check(self) -> None:
        """Refuse an output folder that holds anything but the run to resume."""
        output = self.output
        try:
            if not output.exists() or all(path.match(WRITING) for path in output.iterdir()):
                return
        except OSError as error:
            raise InputError(f"--output {output}: {error.strerror}; choose another folder") from None
        if self.resume is None:
            raise InputError(
                f"--output {output} is not empty; resume its run with --resume auto, or choose "
                "another --output"
            )
        record = read_record(output)
        if self.moves:
            beginning = record.get("beginning")
            is_known = beginning is not None and beginning["state"] is not None
            source = self.state_path.parent.resolve()
            is_known = is_known and Path(beginning["state"]).parent == source
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
        """:func:`described` images; an InputError if they are not those of the run to resume."""
        images = described(splits)
        if resumed is not None:
            before = resumed.get("images") or (self.owner or {}).get("images")
            check_data(splits[0].class_names, images, self.state_path, resumed, before)
        return images

    def claim(
        self, owner: dict, resumed: dict | None, about: Weights
    ) -> tuple[int, list[str]]:
        """Make and lock the output folder, and fit what it holds to the state to resume.

        Until the start is complete, RUN_FILE says how to repeat it.

        Args:
            owner: the run's :meth:`.Checkpointer.identity`.
            resumed: what :meth:`read` returned.
            about: the weights' description, but for epoch and top-1.

        Returns:
            The epoch whose weights are in BEST_FILE, 0 if there are none, and lines on what was set
            aside.
        """
        output = self.output
        if self.moves:  # read before anything is written
            copied = fitting(self.state_path, resumed, about, moves=True)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {output}: {error.strerror}; choose another folder") from None
        self.lock.enter_context(locked(output))
        self.check()  # another run may have begun there since
        if listing(output) != self.before:
            raise InputError(f"--output {output}: another run has just written there; start again")
        for leftover in output.glob(WRITING):  # of a run that was killed
            leftover.unlink()
        if self.state_path is None or self.moves:
            self._record_beginning(owner)
        if resumed is None:
            return 0, []
        best, lines = self._fit(resumed, about, copied if self.moves else None)
        remove_oldest(output, owner["config"]["keep_checkpoints"])
        return best, lines

    def _record_beginning(self, owner: dict) -> None:
        """Let RUN_FILE say how to repeat a start that is not complete yet."""
        source = self.state_path.parent.resolve() / self.state_path.name if self.moves else None
        state = None if source is None else str(source)
        beginning = {"state": state, "config": owner["config"]}
        record = {"starts": []} | read_record(self.output)
        record |= {"beginning": beginning, "identity": owner}
        write_atomically(self.output / RUN_FILE, json.dumps(record, indent=2) + "\n")

    def _fit(
        self, resumed: dict, about: Weights, copied: Fitting | None
    ) -> tuple[int, list[str]]:
        """Fit the folder to the state ``resumed``, with what is ``copied`` of another folder."""
        output = self.output
        state = output / state_name(resumed["state"]["epochs_done"], resumed["state"]["step"])
        if copied is not None:
            replace_files(output, copied.files)
        if self.state_path.resolve() != state.resolve():
            write_state(state, resumed)  # under the name by which --resume auto finds it
        fits = fitting(state, resumed, about)
        lines = [*(copied or fits).lines]
        lines += rewind(output, resumed["state"], fits.strange)
        replace_files(output, fits.files)
        return fits.best, lines

    def record_start(self, owner: dict, trainer: "Trainer") -> None:
        """Write the configuration, the circumstances, and the metrics of the epochs done."""
        world = trainer.world
        write_atomically(self.output / CONFIG_FILE, trainer.checkpointer.config.to_yaml())
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
            "class_names": owner["class_names"],
            "identity": owner,
            "starts": [*record.get("starts", []), start],
        }
        write_metrics(self.output / METRICS_FILE, trainer.history)
        # Last, as it marks the start as complete.
        write_atomically(path, json.dumps(record, indent=2) + "\n")


def listing(output: Path) -> tuple:
    """What changes in a folder whenever a run starts or saves there: its states and RUN_FILE."""
    try:
        record = read_bytes(output / RUN_FILE)
    except OSError:
        record = None
    return [path.name for path in states_in(output)], record


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files by their names."""
    for name, content in contents.items():
        write_atomically(folder / name, content)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the folder for this process; file systems that lock no folders go without.

    Raises:
        InputError: another process holds it.
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
    """What RUN_FILE says: ``starts``, ``identity`` (see :meth:`.Checkpointer.identity`; missing in
    the earlier format), and ``beginning`` until the first start is complete.

    Empty if the file is missing, damaged or another program's.
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
    """One JSON object per line and epoch; null for what is not finite, which JSON cannot say."""
    rows = (
        {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for metrics in history
    )
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
