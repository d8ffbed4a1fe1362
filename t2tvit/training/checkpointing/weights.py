"""Files of weights that describe their model."""

from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from t2tvit.errors import InputError
from t2tvit.files import write_atomically
from t2tvit.models.described import check_described
from t2tvit.models.reading import SAFETENSORS, kind_of
from t2tvit.training.checkpointing.states import check, is_number, is_text
from t2tvit.training.checkpointing.tensors import read_tensors, tensors_file

METADATA_KEY = "t2tvit"


@dataclass(frozen=True)
class Weights:
    """The description in a file of weights: how to build its model and prepare images.

    ``config`` is the run's RunConfig with the mean and std it used; ``top1`` is in percent.
    """

    model: str
    create_args: dict
    class_names: list[str] | None
    config: dict
    epoch: int = 0
    top1: float = 0.0


def save_weights(model: nn.Module, path: Path, about: Weights) -> None:
    """Write a self-describing .safetensors file that ``t2tvit.load_checkpoint`` reads."""
    write_atomically(path, weights_file(model, about))


def weights_file(model: nn.Module, about: Weights) -> bytes:
    """The bytes of the file of :func:`save_weights`."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    return tensors_file(tensors, METADATA_KEY, asdict(about))


def read_about(path: Path) -> Weights | None:
    """The description in a file of weights; None if it does not describe its model.

    Raises:
        InputError: The file is missing, damaged or not a file of weights; or it describes a model that
            does not fit its weights, or arguments that a file may not set.
    """
    if kind_of(path) != SAFETENSORS:
        return None
    try:
        content, _ = read_tensors(path, METADATA_KEY)
        about = None if content is None else Weights(**content)
        if about is not None:
            _check_about(about)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); use another one") from None
    if about is not None:
        check_described(about.model, about.create_args, path.stat().st_size, str(path))
    return about


def _check_about(about: Weights) -> None:
    """Raise a ValueError unless ``about`` has values that a run can have written."""
    if about.config.get("model", about.model) != about.model:
        raise ValueError("it names two models")
    classes = about.class_names
    if classes is not None:
        check(classes, [is_text], "class_names")
        if len(classes) > about.create_args.get("num_classes", len(classes)):
            raise ValueError(f"it names {len(classes)} classes, more than its model has")
    for name in ("epoch", "top1"):
        check(getattr(about, name), is_number, name)
