"""Names of classes: those that a checkpoint or the user gives, or those of ImageNet."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from t2tvit.errors import InputError
from t2tvit.files import read_text

IMAGENET_CLASSES = 1000


def names_of(names: Sequence[str] | None, count: int) -> list[str] | None:
    """``names``. If they are None: the names of ImageNet-1k for 1000 classes, else None.

    The names of ImageNet are those of its folders, such as n01440764.
    """
    if names is not None:
        return list(names)
    return list(_imagenet()) if count == IMAGENET_CLASSES else None


def read_names(path: Path, count: int) -> list[str]:
    """Names from a text file, one per line.

    Raises:
        InputError: The file cannot be read, or does not have ``count`` lines.
    """
    try:
        names = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class-names: {path} cannot be read ({error})") from None
    if len(names) != count:
        raise InputError(f"--class-names: {path} has {len(names)} lines, the model {count} classes")
    return names


def readable(name: str) -> str:
    """The description of the class of ImageNet's folder ``name``; other names unchanged."""
    return _imagenet().get(name, name) if name[:1] == "n" and name[1:].isdecimal() else name


@cache
def _imagenet() -> dict[str, str]:
    """ImageNet-1k's folder names in the order of the classes, with their descriptions."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return {name: info.label_name_to_description(name) for name in info.label_names()}
