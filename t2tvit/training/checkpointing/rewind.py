"""Fits an output folder to the state that a run resumes from.

After a normal stop everything fits already. If the run resumes from an older state, files of later
epochs are renamed, and the weights become those of the epochs up to the state.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from t2tvit.charts import draw_curves
from t2tvit.errors import InputError
from t2tvit.files import read_bytes, set_aside
from t2tvit.training.checkpointing.file_names import (
    BEST_FILE,
    CURVES_FILE,
    LAST_FILE,
    METRICS_FILE,
)
from t2tvit.training.checkpointing.states import read_resumable, state_name, states_in
from t2tvit.training.checkpointing.tensors import tensors_file
from t2tvit.training.checkpointing.weights import METADATA_KEY, Weights, read_about
from t2tvit.training.trackers import ID_FILE


@dataclass(frozen=True)
class Fitting:
    """The content of BEST_FILE and LAST_FILE that fits a state.

    Attributes:
        best: The epoch of BEST_FILE; 0 if the weights of all epochs are lost.
        files: The contents of the files to write, by name.
        strange: The names of files beside the state whose weights do not fit it.
        lines: Log lines about lost weights.
    """

    best: int
    files: dict[str, bytes]
    strange: list[str]
    lines: list[str]


def fitting(path: Path, resumed: dict, about: Weights, moves: bool = False) -> Fitting:
    """The weights that fit the state ``resumed``, read from ``path``, found in files beside it.

    Args:
        about: The description of the weights, without epoch and top-1.
        moves: Whether all files are needed in another folder, including those that fit.

    Raises:
        InputError: A file cannot be read.
    """
    state = resumed["state"]
    history = state["history"]
    known = {name: epoch_of(path.parent / name, history) for name in (BEST_FILE, LAST_FILE)}
    finite = (row for row in history if math.isfinite(row["eval_loss"]))
    ranked = sorted(finite, key=lambda row: (row["top1"], row["epoch"]), reverse=True)
    wanted = {BEST_FILE: [row["epoch"] for row in ranked]}
    wanted[LAST_FILE] = [row["epoch"] for row in history[-1:]]
    found, files, lines = {}, {}, []
    for name, epochs in wanted.items():
        if not moves and known[name] in epochs[:1]:
            found[name] = known[name]
            continue
        contents = ((epoch, weights_of(epoch, path, state, known, about)) for epoch in epochs)
        found[name], content = next((each for each in contents if each[1] is not None), (0, None))
        if content is not None:
            files[name] = content
        if epochs and found[name] != epochs[0]:
            now = f"epoch {found[name]}" if found[name] else "none until the next epoch ends"
            lines.append(f"weights   {name}: {now}; those of epoch {epochs[0]} are lost")
    strange = [
        name
        for name in known
        if not (known[name] and found[name]) and os.path.lexists(path.parent / name)
    ]
    if moves and strange:
        names = ", ".join(str(path.parent / name) for name in strange)
        lines.append(f"not copied {names}: not from an epoch up to {path.name}")
    return Fitting(found[BEST_FILE], files, strange, lines)


def epoch_of(path: Path, history: list[dict]) -> int:
    """The epoch of ``history`` whose weights the file has; 0 if none, missing or damaged."""
    try:
        about = read_about(path)
    except InputError:
        return 0
    if about is None:
        return 0
    known = [(row["epoch"], row["top1"]) for row in history]
    return about.epoch if (about.epoch, about.top1) in known else 0


def weights_of(
    epoch: int, path: Path, state: dict, epochs: dict[str, int], about: Weights
) -> bytes | None:
    """The file of an epoch's weights: a file beside ``path``, or made from the state at its end."""
    for name, found in epochs.items():
        if found == epoch:
            try:
                return read_bytes(path.parent / name)
            except OSError as error:
                raise InputError(
                    f"--resume: cannot read {error.filename}: {error.strerror}"
                ) from None
    history = state["history"][:epoch]
    if (state["epochs_done"], state["step"]) != (epoch, 0):
        beside = path.with_name(state_name(epoch, 0))
        try:
            state = read_resumable(beside)["state"]
        except InputError:
            return None
        if json.dumps(state["history"]) != json.dumps(history):  # NaN equals NaN
            return None
    tensors = state["model"] if state["ema"] is None else state["ema"]
    about = replace(about, epoch=epoch, top1=history[-1]["top1"])
    return tensors_file(tensors, METADATA_KEY, asdict(about))


def rewind(output: Path, state: dict, strange: list[str]) -> list[str]:
    """Rename files in ``output`` that are later than ``state``, and the files ``strange``.

    Returns log lines. METRICS_FILE is renamed if it has later epochs, and must be written again.
    """
    name, history = state_name(state["epochs_done"], state["step"]), state["history"]
    later = [path for path in states_in(output) if path.name > name]
    later += [output / each for each in strange]
    if rows_in(output / METRICS_FILE) > len(history):
        # Weights & Biases accepts no epoch twice, so the run gets a new id there.
        later += [path for path in (output / METRICS_FILE, output / ID_FILE) if path.exists()]
        draw(history, output / CURVES_FILE)
    renamed = [f"{path.name} to {set_aside(path).name}" for path in later]
    if not renamed:
        return []
    return [f"renamed files that are not from the run up to {name}: {', '.join(renamed)}"]


def draw(history: list[dict], path: Path) -> None:
    """Draw the curves of completed epochs; remove the file if there are none."""
    if history:
        draw_curves(history, path)
    else:
        path.unlink(missing_ok=True)


def rows_in(path: Path) -> int:
    """The number of lines of a file; 0 if it cannot be read."""
    try:
        return read_bytes(path).count(b"\n")
    except OSError:
        return 0
