"""Checks of models that a file describes: allowed arguments, and a size that fits the file."""

import math
from collections.abc import Sequence

import torch

from t2tvit.errors import InputError
from t2tvit.models.bounds import DEPTHS, LARGEST, LARGEST_DEPTH
from t2tvit.models.registry import BASELINES, MODELS, create_model
from t2tvit.models.timm_models import TIMM, TIMM_ARGUMENTS, create_timm_model


def check_described(name: object, args: object, space: int, source: str) -> None:
    """Raise unless a file may describe this model.

    Args:
        name: The name of the model, as in :func:`t2tvit.create_model`, or ``timm:NAME``.
        args: The arguments that build it.
        space: Size in bytes of the file with its weights, which limits their number.
        source: The file, for the message.

    Raises:
        InputError: The model is unknown, an argument is one that a file may not set or has a value
            that is not plain, or the model is larger than the file.
    """
    if not isinstance(name, str) or not isinstance(args, dict):
        raise InputError(f"{source}: it does not describe a model")
    if not name.startswith(TIMM) and name not in MODELS | BASELINES:
        raise InputError(f"{source}: the model {name[:80]!r} is unknown")
    for key, value in args.items():
        if name.startswith(TIMM) and key not in TIMM_ARGUMENTS:
            raise InputError(
                f"{source}: it sets the argument {str(key)[:80]!r} of {name}; a file may only set "
                "arguments that shape the network"
            )
        if not _is_plain(value, LARGEST_DEPTH if key in DEPTHS else LARGEST):
            raise InputError(f"{source}: the argument {str(key)[:80]!r} of {name} is {value!r:.80}")
    try:
        with torch.device("meta"):
            if name.startswith(TIMM):
                model = create_timm_model(name, **args)
            else:
                model = create_model(name, **args)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: no {name} can be built with {args}: {error}") from None
    count = sum(math.prod(value.shape) for value in model.state_dict().values())
    if count > space:  # a number needs at least one byte
        raise InputError(
            f"{source}: it describes a {name} of {count:,} numbers, but its file has {space:,} bytes"
        )


def _is_plain(value: object, most: int) -> bool:
    """Whether ``value`` is a bounded number, a word, None, or a short list of such."""
    if isinstance(value, str):
        return value.replace("_", "").isalnum() and len(value) < 50
    if isinstance(value, Sequence):
        return len(value) <= 100 and all(_is_plain(item, most) for item in value)
    return value is None or (isinstance(value, (int, float)) and abs(value) <= most)
