"""Files of training states: names, format, and checks of their content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from torch import Tensor

from t2tvit.errors import InputError
from t2tvit.training.checkpointing.file_names import STATE_FILES
from t2tvit.training.checkpointing.tensors import read_tensors, write_tensors

CONTENT_KEY, TENSOR_KEY = "t2tvit_state", "__tensor__"


def state_name(epochs_done: int, step: int) -> str:
    """The name of a state's file; names sort in the order of the states."""
    return f"state-{epochs_done:05d}-{step:08d}.safetensors"


def states_in(output: Path) -> list[Path]:
    """The files of training states, the newest first."""
    return sorted(output.glob(STATE_FILES), reverse=True)


def remove_oldest(output: Path, keep: int) -> None:
    """Remove all training states except the ``keep`` newest."""
    for path in states_in(output)[keep:]:
        path.unlink()


def find_state(output: Path) -> tuple[Path | None, list[str]]:
    """The newest valid state, and why each newer one is not valid.

    Raises:
        InputError: There are states, and all are damaged.
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
        raise InputError(f"every training state in {output} is damaged: {'; '.join(damaged)}")
    return None, []


def write_state(path: Path, content: dict) -> None:
    """Write nested lists and dicts with tensors as safetensors; everything but tensors as JSON."""
    tensors: dict[str, Tensor] = {}
    content = _take_tensors(content, "", tensors)
    write_tensors(path, tensors, CONTENT_KEY, content)


def read_state(path: Path) -> dict:
    """The content of a file of :func:`write_state`, on the CPU; its keys are text.

    Raises:
        InputError: The file is missing, damaged, or not a training state.
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
        raise InputError(f"{path} is not a training state; --resume expects a run's {STATE_FILES}")
    return content


def read_resumable(path: Path) -> dict:
    """:func:`read_state`, with a check that a run can resume from the state.

    Raises:
        InputError: See there, or the content does not have the form of a state.
    """
    content = read_state(path)
    try:
        check_state(content)
    except ValueError as error:
        raise InputError(f"training state {path} is damaged ({error})") from None
    return content


def _take_tensors(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """``value`` with each tensor moved to ``tensors`` and replaced by its name there."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous()
        return {TENSOR_KEY: name}
    if isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
        return {key: _take_tensors(item, f"{name}.{key}", tensors) for key, item in items}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`_take_tensors`."""
    if isinstance(value, dict):
        if TENSOR_KEY in value:
            return tensors[value[TENSOR_KEY]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


# The form of a state's content. A valid checksum does not guarantee it.


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_mapping(value: object) -> TypeGuard[dict]:
    return isinstance(value, dict)


def are_tensors(value: object) -> bool:
    return is_mapping(value) and all(isinstance(each, Tensor) for each in value.values())


IMAGES = {name: {"images": is_count, "digest": is_text} for name in ("train", "val")}
METRICS = dict.fromkeys(("epoch", "train_loss", "eval_loss", "top1", "seconds"), is_number)
# Required content: dicts with these keys, lists of such items, values that pass the function.
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
    "ranks": [
        {"rng": is_mapping, "loss_sum": is_number, "images": is_count, "unreadable": [is_text]}
    ],
    "config": is_mapping,
    "class_names": [is_text],
}


def check_state(content: Any) -> None:
    """Raise a ValueError unless ``content``, read from a file, has the form of a training state."""
    check(content, STATE, "content")
    if "images" in content:  # states of the earlier format do not describe their images
        check(content["images"], IMAGES, "images")
    if not content["ranks"]:
        raise ValueError("ranks is empty")
    if len(content["state"]["history"]) != content["state"]["epochs_done"]:
        raise ValueError("history does not have one entry per epoch")


def check(value: object, form: dict | list | Callable[[object], bool], place: str) -> None:
    """Raise a ValueError that names the place where ``value`` does not have the ``form``."""
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
