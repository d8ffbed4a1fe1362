"""Trained models in one call, with the transform of their images and their class names."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from t2tvit import hub
from t2tvit.errors import InputError, unknown_name
from t2tvit.models.checkpoint import read_state_dict
from t2tvit.models.registry import pretrained_cfg

if TYPE_CHECKING:
    from PIL.Image import Image

    from t2tvit.training.config import RunConfig


class Loaded(NamedTuple):
    """A model with its weights.

    Attributes:
        model: The model in evaluation mode.
        transform: The transform of its images.
        class_names: Names of the logits, in order; None if unknown.
    """

    model: nn.Module
    transform: "Preparation"
    class_names: list[str] | None


class Preparation:
    """Converts a PIL image, or the path of one, to the model's input: float32 (C, H, W).

    It runs on the CPU, also in worker processes of a loader.
    """

    def __init__(self, config: "RunConfig", mean: tuple[float, ...], std: tuple[float, ...]):
        from t2tvit.data.images import MODES
        from t2tvit.training.pipeline import eval_transform

        if len(mean) not in MODES:
            raise InputError(
                f"images are grey or colour, but the model has {len(mean)} input channels"
            )
        self.mode = MODES[len(mean)]
        self.resize = eval_transform(config)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: "Image | str | PathLike") -> Tensor:
        """
        Raises:
            InputError: The file cannot be read.
        """
        from t2tvit.data.images import load_image

        if isinstance(image, str | PathLike):
            image = load_image(Path(image), self.mode)
        elif image.mode != self.mode:
            image = image.convert(self.mode)
        return (self.resize(image).float() / 255 - self.mean) / self.std


def load(
    source: str | PathLike,
    *,
    model: str | None = None,
    model_args: dict | None = None,
    weights: str = "best",
    fused_kernels: str = "auto",
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load a trained model. Needs the packages of ``t2tvit[train]``.

    Args:
        source: The folder of a training run, one of its files of weights, a published
            ``.pth(.tar)`` or other checkpoint, ``local-dir:FOLDER`` or ``hf-hub:USER/NAME``.
        model: The name of the model, only for a checkpoint that does not name it. Image size and
            number of classes are derived from the weights.
        model_args: With ``model``, arguments of :func:`t2tvit.create_model` that differ from the
            published configuration.
        weights: "best" or "last" weights of a run.
        fused_kernels: As in :func:`t2tvit.create_model`.
        device: The device of the model.

    Returns:
        The model, the transform of its images, and the class names: those that the checkpoint gives,
        or ImageNet's for 1000 classes.

    Raises:
        InputError: An argument is invalid, or ``source`` is not such a model; see also
            :func:`t2tvit.load_checkpoint`.
        BackendUnavailable: ``fused_kernels`` names a backend that cannot run the model.
        RunError: The Hub cannot be reached or rejects the request.
    """
    from t2tvit.class_names import names_of
    from t2tvit.data.sources import IMAGENET_STATISTICS
    from t2tvit.training.checkpointing import BEST_FILE, LAST_FILE
    from t2tvit.training.config import BACKEND_CHOICES
    from t2tvit.training.distributed import World
    from t2tvit.training.inference import describe_checkpoint, load_trained, weights_of

    if weights not in ("best", "last"):
        raise InputError(f"weights: {unknown_name('choice', weights, ('best', 'last'))}")
    if fused_kernels not in BACKEND_CHOICES:
        known = unknown_name("backend", fused_kernels, BACKEND_CHOICES)
        raise InputError(f"fused_kernels: {known}")
    world = World(0, 1, _device(device))
    path = Path(source)
    if not hub.is_address(str(source)) and path.is_dir():
        if (path / BEST_FILE).is_file() or (path / LAST_FILE).is_file():
            path = weights_of(path, weights, str(path))
    overrides: dict[str, Any] = {"fused_kernels": fused_kernels}
    if model is not None:
        overrides |= {"model": model, "model_args": model_args or {}, **_published(path, model)}
    elif model_args is not None:
        raise InputError("model_args: accepted only together with model; omit it, or give model")
    path, config, about = describe_checkpoint(path, overrides)
    trained = load_trained(path, config, about, world)
    known = (values[: trained.channels] for values in IMAGENET_STATISTICS)
    transform = Preparation(config, *config.statistics(*known))
    names = names_of(trained.class_names, trained.model.num_classes)
    return Loaded(trained.model.eval(), transform, names)


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        cause = str(error).split("\n")[0]
        raise InputError(f"device: got {device!r}, which cannot be used: {cause}") from None


def _published(path: Path, model: str) -> dict:
    """The configuration of published weights: sizes of the tensors, preprocessing of the paper."""
    from t2tvit.conversion import sizes

    _, state = read_state_dict(path, warn=False)
    found = sizes(state)
    size = found.get("img_size", 224)
    cfg = pretrained_cfg(model, (size, size))
    return found | {key: cfg[key] for key in ("crop_pct", "interpolation", "mean", "std")}
