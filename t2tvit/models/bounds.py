"""Checks of arguments that the models share. Each error names argument, got, expected."""

from collections.abc import Iterator, Mapping, Sequence

from t2tvit.errors import InputError

MIN_SIZE = 16
# Far above any published model. If a number of layers is given per stage, the stages are added.
LARGEST, LARGEST_DEPTH = 1_000_000, 1000
DEPTHS = ("depth", "depths", "stages", "layers", "num_stages", "depth_multiplier")


def check_bounds(args: Mapping[str, object]) -> None:
    """Raise an InputError if building a model with these arguments would need too much memory or time."""
    for name, value in args.items():
        numbers = [abs(number) for number in _numbers(value)]
        size, most = max(numbers, default=0), LARGEST
        if name in DEPTHS:
            size, most = sum(numbers), LARGEST_DEPTH
        if not size <= most:
            raise InputError(f"{name}: got {value!r:.80}, expected at most {most:,}")


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _numbers(item)


def check_integer(name: str, value: object, least: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``least``, else raise an InputError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name}: got {value!r}, expected an integer")
    if value < least:
        raise InputError(f"{name}: got {value}, expected at least {least}")
    return value


def check_rate(name: str, value: object) -> float:
    """Return ``value`` if it is a probability below 1, else raise an InputError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"{name}: got {value!r}, expected a number")
    if not 0 <= value < 1:
        raise InputError(f"{name}: got {value}, expected at least 0 and less than 1")
    return value


def check_positive(name: str, value: object) -> float:
    """Return ``value`` if it is a positive number, else raise an InputError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"{name}: got {value!r}, expected a number")
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: got {value}, expected a positive number")
    return value


def check_image_size(value: object) -> tuple[int, int]:
    """``img_size``, an integer or a pair, as (height, width)."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise InputError(f"img_size: got {value!r}, expected an integer or (height, width)")
    height, width = (check_integer("img_size", side, MIN_SIZE) for side in pair)
    return height, width
