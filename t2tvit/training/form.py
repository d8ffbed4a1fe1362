"""Whether a file holds a training state, before anything uses it. Its checksum proves no form."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def are_tensors(value: object) -> bool:
    return is_mapping(value) and all(isinstance(each, Tensor) for each in value.values())


IMAGES = {name: {"images": is_count, "digest": is_text} for name in ("train", "val")}
METRICS = {name: is_number for name in ("epoch", "train_loss", "eval_loss", "top1", "seconds")}
# What must be there: dicts with these keys, lists of the one item, values that pass the function.
STATE = {
    "state": {
        "model": are_tensors,
        "ema": lambda value: value is None or are_tensors(value),
        "optimizer": {"state": is_mapping, "param_groups": [is_mapping]},
        "scaler": is_mapping,
        "updates": is_count,
        "epochs_done": is_count,
        "step": is_count,
        "skipped": is_count,
        "skipped_in_a_row": is_count,
        "history": [METRICS],
    },
    "ranks": [{"rng": is_mapping, "loss_sum": is_number, "images": is_count, "unreadable": [is_text]}],
    "config": is_mapping,
    "class_names": [is_text],
}
# Moments of optimisers that have their parameter's shape.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def check_state(content: object) -> None:
    """Raise a ValueError unless ``content``, read from a file, has the form of a training state."""
    check(content, STATE, "content")
    if "images" in content:  # states of the earlier format do not describe their images
        check(content["images"], IMAGES, "images")
    if not content["ranks"]:
        raise ValueError("ranks is empty")
    if len(content["state"]["history"]) != content["state"]["epochs_done"]:
        raise ValueError("history has not one entry per epoch")


def check(value: object, form: dict | list | Callable[[object], bool], place: str) -> None:
    """Raise a ValueError that names the place where ``value`` has not the ``form``."""
    if isinstance(form, dict) and is_mapping(value):
        for key, inside in form.items():
            if key not in value:
                raise ValueError(f"{place} has no {key}")
            check(value[key], inside, key)
    elif isinstance(form, list) and isinstance(value, list):
        for item in value:
            check(item, form[0], place)
    elif isinstance(form, (dict, list)) or not form(value):
        raise ValueError(f"{place} is {type(value).__name__} {repr(value)[:40]}")


def check_optimizer(optimizer: torch.optim.Optimizer, before: list[dict]) -> None:
    """Raise a ValueError unless a state that was loaded fits the parameters and their groups.

    Args:
        optimizer: with the loaded state.
        before: its groups before, which tell which options are numbers.
    """
    for parameter, state in optimizer.state.items():
        for name in MOMENTS:
            moment = state.get(name)
            if isinstance(moment, Tensor) and moment.shape != parameter.shape:
                shapes = tuple(moment.shape), tuple(parameter.shape)
                raise ValueError("{} has the shape {}, expected {}".format(name, *shapes))
    for old, new in zip(before, optimizer.param_groups, strict=True):
        for name, value in old.items():
            if is_number(value) and not is_number(new.get(name)):
                raise ValueError(f"{name} of the optimiser is {new.get(name)!r:.40}, expected a number")
