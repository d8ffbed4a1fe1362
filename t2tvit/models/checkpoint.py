"""Loading of published and own checkpoints into a model, without ever running code from a file."""

import argparse
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from t2tvit.errors import InputError
from t2tvit.models.backbone import T2TBackbone
from t2tvit.models.positions import resize_positions

_logger = logging.getLogger(__name__)

# Where a checkpoint may keep its weights, the preferred place first.
WRAPPERS = ("state_dict_ema", "state_dict", "model")
# What DataParallel and torch.compile put before every name, also repeatedly.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
# How torch.load names what it will not read with weights_only.
UNSAFE = re.compile(r"Unsupported (?:global|class)\S* (?:GLOBAL )?([\w.]+)")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        wrapper: the checkpoint's entry that held the weights; None where they lay bare.
        loaded: number of tensors copied into the model.
        resized: the checkpoint's grid of positions and the model's, where they differ.
        dropped_classes: number of classes of the checkpoint's head, where it was dropped.
    """

    wrapper: str | None
    loaded: int
    resized: tuple[tuple[int, int], tuple[int, int]] | None = None
    dropped_classes: int | None = None


def load_checkpoint(
    model: T2TBackbone,
    path: str | PathLike,
    *,
    grid_size: tuple[int, int] | None = None,
) -> LoadReport:
    """Load the weights of a ``.safetensors`` file, or of one that ``torch.save`` wrote.

    The weights may lie in an entry "state_dict_ema" (taken first), "state_dict" or "model", and
    their names may begin with "module." or "_orig_mod.". Positions of another number are resized
    to the model's grid. A head of another number of classes is dropped, and the model's newly
    initialised. Either is logged as a warning. The model is left as it was if anything is wrong.

    Args:
        model: a model of this package.
        path: the file.
        grid_size: (h, w) of the checkpoint's tokens. Without it as many positions as the model's
            are taken to be the same grid, and others to be a square one.

    Raises:
        InputError: the file cannot be read as a checkpoint without running code, or does not fit
            the model; the message names the keys.
        TypeError: ``model`` is not a model of this package.
    """
    if not isinstance(model, T2TBackbone):
        raise TypeError(f"model: got {type(model).__name__}, expected one made by create_model")
    path = Path(path)
    wrapper, state = read_state_dict(path)
    own = model.state_dict()

    resized = None
    positions = state.get("pos_embed")
    if positions is not None and _are_positions(positions, own["pos_embed"]):
        old = _grid(positions, grid_size, model.grid_size, path)
        if old != model.grid_size:
            state["pos_embed"] = resize_positions(positions, old, model.grid_size)
        resized = (old, model.grid_size) if old != model.grid_size else None

    dropped_classes = None
    head = state.get("head.weight")
    if head is not None and head.dim() == 2 and head.shape[0] != model.num_classes:
        dropped_classes = head.shape[0]
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        own = {name: tensor for name, tensor in own.items() if not name.startswith("head.")}

    _check_fit(state, own, path)
    model.load_state_dict(state, strict=False)
    if resized is not None:
        _logger.warning("%s: positions resized from %s to %s", path, *resized)
    if dropped_classes is not None:
        model.reset_classifier(model.num_classes)
        _logger.warning(
            "%s: its head of %d classes is dropped; the model has a new one of %d",
            path,
            dropped_classes,
            model.num_classes,
        )
    return LoadReport(wrapper, len(state), resized, dropped_classes)


def read_state_dict(path: str | PathLike) -> tuple[str | None, dict[str, Tensor]]:
    """The name of the entry that holds a file's weights, and these, without prefixes.

    Raises:
        InputError: the file cannot be read as a checkpoint without running code.
    """
    path = Path(path)
    return _unwrap(_read(path), path)


def _read(path: Path) -> object:
    """The content of a checkpoint file."""
    if not path.exists():
        raise InputError(f"checkpoint: there is no file {path}")
    if not path.is_file():
        raise InputError(f"checkpoint: got {path}, which is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # A Namespace of options, which published checkpoints hold, runs no code when it is read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise InputError(
            f"checkpoint: reading {path} needs the package safetensors; `pip install safetensors`"
        ) from error
    # Damaged files raise many kinds of error, safetensors' own among them: no narrower base exists.
    except Exception as error:
        if unsafe := UNSAFE.search(str(error)):
            raise InputError(
                f"checkpoint: {path} holds {unsafe[1]}, and reading that could run code, so it is "
                f"not read. If you trust who made the file, save its weights alone once, "
                f"torch.save(torch.load(path, weights_only=False)['state_dict'], new_path), and "
                f"load that file"
            ) from error
        cause = str(error).strip().split("\n")[0]
        raise InputError(
            f"checkpoint: {path} cannot be read; it is truncated or of another format "
            f"({type(error).__name__}: {cause})"
        ) from error


def _unwrap(content: object, path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The wrapper's name and the state dict in it, without prefixes."""
    if not isinstance(content, Mapping):
        raise InputError(
            f"checkpoint: got a {type(content).__name__} in {path}, expected a state dict"
        )
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    entries = content if wrapper is None else content[wrapper]
    others = [
        str(name)
        for name, value in entries.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others or not entries:
        place = "" if wrapper is None else f" in its {wrapper}"
        found = f"entries that are no tensors: {_some(others)}" if others else "nothing"
        raise InputError(
            f"checkpoint: {path} holds{place} {found}; expected a state dict, bare or as "
            f"{', '.join(WRAPPERS[:-1])} or {WRAPPERS[-1]}"
        )
    state = {PREFIXES.sub("", name): tensor for name, tensor in entries.items()}
    if len(state) != len(entries):
        raise InputError(f"checkpoint: names of {path} coincide without their prefixes")
    return wrapper, state


def _are_positions(positions: Tensor, own: Tensor) -> bool:
    """Whether the two differ in the number of positions at most."""
    return (
        positions.dim() == 3 and positions.shape[1] > 1 and positions.shape[::2] == own.shape[::2]
    )


def _grid(
    positions: Tensor, given: tuple[int, int] | None, own: tuple[int, int], path: Path
) -> tuple[int, int]:
    """The grid (h, w) of a checkpoint's positions."""
    count = positions.shape[1] - 1
    if given is not None:
        pair = isinstance(given, Sequence) and len(given) == 2
        if not pair or not all(isinstance(side, int) for side in given):
            raise InputError(f"grid_size: got {given!r}, expected (h, w)")
        if given[0] * given[1] != count:
            raise InputError(f"grid_size: got {given}, but {path} has {count} positions")
        return tuple(given)
    if count == own[0] * own[1]:
        return own
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(
            f"checkpoint: the {count} positions of {path} are no square grid; give load_checkpoint "
            f"its grid_size=(h, w)"
        )
    return side, side


def _check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless both have the same names and shapes."""
    faults = []
    if missing := [name for name in own if name not in state]:
        faults.append(f"missing: {_some(missing)}")
    if unexpected := [name for name in state if name not in own]:
        faults.append(f"unexpected: {_some(unexpected)}")
    if wrong := [
        f"{name} (got {tuple(tensor.shape)}, expected {tuple(own[name].shape)})"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]:
        faults.append(f"wrong shape: {_some(wrong)}")
    if faults:
        raise InputError(f"checkpoint: {path} does not fit the model; " + "; ".join(faults))


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
