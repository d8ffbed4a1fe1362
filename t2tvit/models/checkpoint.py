"""Loads our and published checkpoints into a model, without running code from a file."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from t2tvit.errors import InputError
from t2tvit.models.backbone import T2TBackbone
from t2tvit.models.positions import resize_positions
from t2tvit.models.reading import read_file
from t2tvit.models.registry import BASELINES, MODELS
from t2tvit.models.variants import DenseBlock, GhostAttention, SEAttention

_logger = logging.getLogger(__name__)

# Names of entries with weights, in order of preference: averages before the last weights.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict"),
    *("model_state", "net", "weights"),
)
# The maximum nesting depth of weights in a checkpoint.
DEPTH = 3
# Prefixes that DataParallel and torch.compile add to every name, possibly repeated.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
# A prefix that a framework adds to all names of a T2T-ViT, such as "backbone.".
OUTER_PREFIX = re.compile(r"(.+?\.)tokens_to_token\.")
BLOCK = re.compile(r"blocks\.(\d+)\.(?!linear\.)")
# For each kind of tokens, a tensor under "tokens_to_token." that only it has.
TOKENS = {
    "performer": "attention1.w",
    "transformer": "attention1.attn.qkv.weight",
    "convolution": "attention1.weight",
    "patch": "proj.weight",
}
# For each kind of layer, a part of tensor names that only it has.
LAYERS = {
    SEAttention: ".se_layer.",
    GhostAttention: ".cheap_operation_q.",
    DenseBlock: ".dense_linear.",
}
# Layers that read the image: their features or channels have the order (channel, row, column).
STEM_NORMS = tuple(f"tokens_to_token.attention1.norm1.{part}" for part in ("weight", "bias"))
STEM_QKV = "tokens_to_token.attention1.attn.qkv.weight"
STEM_WEIGHTS = (
    *("tokens_to_token.attention1.kqv.weight", STEM_QKV),
    *("tokens_to_token.attention1.weight", "tokens_to_token.proj.weight"),
)
# Counters that thop.profile adds to every module.
COUNTERS = ("total_ops", "total_params")


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_checkpoint`.

    Attributes:
        wrapper: The checkpoint's entry with the weights; None if the checkpoint is a state dict.
        loaded: Number of tensors copied into the model.
        resized: The position grids of the checkpoint and the model, if they differ.
        dropped_classes: Number of classes of the checkpoint's head, if it was dropped; 0 if the
            checkpoint has no head and the model has a new one.
        in_chans: Image channels of the checkpoint and the model, if they differ.
    """

    wrapper: str | None
    loaded: int
    resized: tuple[tuple[int, int], tuple[int, int]] | None = None
    dropped_classes: int | None = None
    in_chans: tuple[int, int] | None = None


def load_checkpoint(
    model: T2TBackbone,
    path: str | PathLike,
    *,
    grid_size: tuple[int, int] | None = None,
    new_head: bool = True,
) -> LoadReport:
    """Load the weights of a ``.safetensors`` file, or of a file written by ``torch.save``.

    The weights may be an entry of the checkpoint, whatever its name. If there are several, averages
    ("state_dict_ema", "model_ema", "ema") come before "state_dict", "model" and the like. Names may
    begin with "module.", "_orig_mod." or another prefix that all share. Counters of thop are ignored.
    Position embeddings are resized to the model's grid. Weights for grey images are adapted to colour
    images, and vice versa. If the checkpoint's head is missing or has another number of classes, the
    model gets a newly initialised head. Each of these, and non-finite weights, is logged as a
    warning. If an error is raised, the model is unchanged.

    Args:
        model: A model of this package.
        path: The file.
        grid_size: (h, w) of the checkpoint's tokens. By default, the model's grid if the number of
            positions is equal, else a square grid.
        new_head: Whether to create a new head if it is missing or has another number of classes;
            if False, this is an error.

    Raises:
        InputError: The file cannot be read as a checkpoint without running code, or does not fit the
            model. The message says what the file is, or names the keys.
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

    if others := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise InputError(
            f"checkpoint: {path} holds weights that are {state[others[0]].dtype}, expected "
            f"floating-point ones: {_some(others)}"
        )
    in_chans = _adapt_channels(state, own, model.tokens_to_token.in_chans, path)
    dropped_classes = None
    head = state.get("head.weight")
    if head is not None and head.dim() == 2 and head.shape[0] != model.num_classes:
        dropped_classes = head.shape[0]
    elif model.num_classes > 0 and not any(name.startswith("head.") for name in state):
        dropped_classes = 0
    if dropped_classes == 0 and not new_head:
        raise InputError(
            f"checkpoint: {path} has no head (head.weight), so it gives features, not classes; train "
            "one with `t2tvit train --init`"
        )
    if dropped_classes is not None and not new_head:
        raise InputError(
            f"num_classes: {path} has {dropped_classes} classes, the model {model.num_classes}; "
            f"give --num-classes {dropped_classes}"
        )
    if dropped_classes is not None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        own = {name: tensor for name, tensor in own.items() if not name.startswith("head.")}

    found, expected = describe(state), describe(own)
    if found and found != expected:
        raise InputError(f"checkpoint: {path} holds {found}, the model is {expected}")
    check_fit(state, own, path)
    model.load_state_dict(state, strict=False)
    if resized is not None:
        _logger.warning("%s: positions resized from %s to %s", path, *resized)
    if in_chans is not None:
        _logger.warning("%s: weights for %d channels adapted to %d", path, *in_chans)
    if dropped_classes is not None:
        model.reset_classifier(model.num_classes)
        old = f"its head of {dropped_classes} classes is dropped" if dropped_classes else "no head"
        _logger.warning("%s: %s; the model has a new one of %d", path, old, model.num_classes)
    infinite = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if infinite:
        _logger.warning("%s: weights that are not finite: %s", path, _some(infinite))
    return LoadReport(wrapper, len(state), resized, dropped_classes, in_chans)


def read_state_dict(
    path: str | PathLike, *, warn: bool = True
) -> tuple[str | None, dict[str, Tensor]]:
    """The name of the entry with a file's weights, and the weights without prefixes.

    Args:
        path: The file.
        warn: Whether to log ignored entries; False if the file will be read again.

    Raises:
        InputError: The file cannot be read as a checkpoint without running code.
    """
    path = Path(path)
    return _unwrap(read_file(path), path, _logger.warning if warn else lambda *_: None)


def _unwrap(
    content: object, path: Path, warn: Callable[..., None]
) -> tuple[str | None, dict[str, Tensor]]:
    """The name of the wrapper and its state dict without prefixes."""
    if not isinstance(content, Mapping):
        raise InputError(
            f"checkpoint: got a {type(content).__name__} in {path}, expected a state dict"
        )
    wrapper = _choose(content, path, warn)
    entries = content
    for name in wrapper.split(".") if wrapper else ():
        entries = entries[name]
    others = [
        str(name)
        for name, value in entries.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others or not entries:
        place = f" in its {wrapper}" if wrapper else ""
        found = f"entries that are not tensors: {_some(others)}" if others else "nothing"
        raise InputError(
            f"checkpoint: {path} holds{place} {found}; expected a state dict, alone or as one entry "
            f"such as {', '.join(WRAPPERS[:-1])} or {WRAPPERS[-1]}"
        )
    state = {PREFIXES.sub("", name): tensor for name, tensor in entries.items()}
    # A prefix that Lightning and other frameworks add to every name.
    outer = next((match[1] for match in map(OUTER_PREFIX.match, state) if match), "")
    if all(name.startswith(outer) for name in state):
        state = {name.removeprefix(outer): tensor for name, tensor in state.items()}
    if len(state) != len(entries):
        raise InputError(f"checkpoint: names in {path} are not unique without their prefixes")
    counters = [name for name in state if name.rpartition(".")[2] in COUNTERS]
    if counters:
        warn("%s: ignored the counters of thop: %s", path, _some(counters, 2))
    return wrapper or None, {name: state[name] for name in state if name not in counters}


def _choose(content: Mapping, path: Path, warn: Callable[..., None]) -> str:
    """The dotted path of the entry with the weights; empty if the content is a state dict."""
    found = list(_state_dicts(content, "", 0, set()))
    if "" in found:
        return ""
    chosen = next((name for name in WRAPPERS if name in found), None)
    if chosen is None and len(found) > 1:
        raise InputError(
            f"checkpoint: {path} holds several sets of weights: {_some(found)}; save the one to "
            "use in a file of its own"
        )
    if chosen is None and found:
        chosen = found[0]
    if chosen is None:
        return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), "")
    if len(found) > 1:
        warn("%s: holds the weights %s; %s is used", path, ", ".join(found), chosen)
    return chosen


def _state_dicts(content: Mapping, place: str, depth: int, seen: set[int]) -> Iterator[str]:
    """The dotted paths of all mappings in ``content`` whose values are the tensors of a model.

    ``seen`` has the searched mappings: a small file can contain the same one in very many places.
    """
    if id(content) in seen or not content or not all(isinstance(name, str) for name in content):
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        if depth == 0 or any(name.endswith("weight") for name in content):
            yield place
    elif depth < DEPTH:
        seen.add(id(content))
        for name, value in content.items():
            if isinstance(value, Mapping) and "." not in name and "optim" not in name:
                inside = f"{place}.{name}" if place else name
                yield from _state_dicts(value, inside, depth + 1, seen)


def _are_positions(positions: Tensor, own: Tensor) -> bool:
    """Whether the two differ at most in the number of positions."""
    return (
        positions.dim() == 3 and positions.shape[1] > 1 and positions.shape[::2] == own.shape[::2]
    )


def _adapt_channels(
    state: dict[str, Tensor], own: Mapping[str, Tensor], in_chans: int, path: Path
) -> tuple[int, int] | None:
    """Adapt weights for grey images to colour images, or vice versa; returns both channel numbers.

    A grey image is treated as three equal channels: projections are summed over the channels or
    divided among them, and parameters of norms are averaged or repeated.

    Raises:
        InputError: The numbers of channels are other ones.
    """
    weight = next((name for name in STEM_WEIGHTS if name in state and name in own), None)
    if weight is None or state[weight].dim() != own[weight].dim():
        return None
    width, ours = state[weight].shape[1], own[weight].shape[1]
    old, new = width * in_chans // ours, in_chans
    if old == new:
        return None
    if {old, new} != {1, 3}:
        raise InputError(
            f"in_chans: {path} is for images with {old} channels, the model for {new}; only grey and "
            "colour can be adapted to each other"
        )
    for name in {weight, *STEM_NORMS} & state.keys():
        axis = 0 if name in STEM_NORMS else 1
        channels = state[name].unflatten(axis, (old, -1)).mean(axis, keepdim=True)
        if name == weight:
            channels = channels * (old / new)
        state[name] = channels.repeat_interleave(new, axis).flatten(axis, axis + 1)
    if weight == STEM_QKV:
        # The softmax scale is the token width^-½, so the queries must compensate for another width.
        queries, rest = state[weight].tensor_split([len(state[weight]) // 3])
        state[weight] = torch.cat([queries * (new / old) ** 0.5, rest])
    return old, new


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
        return given[0], given[1]
    if count == own[0] * own[1]:
        return own
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(
            f"checkpoint: the {count} positions of {path} are not a square grid; give the image size "
            "of the weights (--img-size HEIGHT WIDTH), or load_checkpoint their grid_size=(h, w)"
        )
    return side, side


def describe(state: Mapping[str, Tensor]) -> str:
    """A description of the model of a state dict: its blocks, and its name if it is published.

    Empty for a T2T-ViT without a class token, which is needed for the width.
    """
    kinds = [kind for kind, name in TOKENS.items() if f"tokens_to_token.{name}" in state]
    if not any(name.startswith("tokens_to_token.") for name in state):
        return f"no T2T-ViT (its tensors are {_some(list(state), 3)})"
    class_token = state.get("cls_token")
    if not kinds or class_token is None or class_token.dim() != 3:
        return ""
    depth = len({match[1] for match in map(BLOCK.match, state) if match})
    width = class_token.shape[-1]
    layer = next((each for each, key in LAYERS.items() if any(key in name for name in state)), None)
    text = f"{depth} block{'s' * (depth != 1)} of width {width} on {kinds[0]} tokens"
    if layer is not None:
        text += f" with {layer.__name__}"
    for name, published in (MODELS | BASELINES).items():
        options = published.options
        theirs = options.get("attention_layer"), options.get("tokens_type", "performer")
        if theirs == (layer, kinds[0]) and (options.get("depth"), options.get("embed_dim")) == (
            depth,
            width,
        ):
            return f"{name} ({text})"
    return text


def check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raise an InputError unless both have the same names and shapes."""
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
