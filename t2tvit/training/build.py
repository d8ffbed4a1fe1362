"""Models as a run needs them: built from a configuration, proved to run, described in its log."""

import platform
from collections.abc import Iterator

import torch

from t2t_kernels.backends import explain
from t2tvit.data.sources import Split
from t2tvit.errors import InputError
from t2tvit.models import T2TBackbone, create_model
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.engine import precision
from t2tvit.training.pipeline import size_of


def create_args(config: RunConfig, num_classes: int, channels: int) -> dict:
    """The arguments of ``create_model`` that rebuild the model of ``config``."""
    return {
        "img_size": list(size_of(config)),
        "num_classes": config.num_classes or num_classes,
        "in_chans": channels,
        "drop_path_rate": config.drop_path,
    } | config.model_args


def build_model(name: str, args: dict, fused_kernels: str) -> T2TBackbone:
    """``create_model``, with every argument that does not fit reported as the user's."""
    try:
        return create_model(name, fused_kernels=fused_kernels, **args)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"model {name} with {args}: {error}") from None


@torch.no_grad()
def try_forward(model: T2TBackbone, config: RunConfig, channels: int, world: World) -> None:
    """Run one blank image, so that what cannot work is said before anything is written.

    Raises:
        BackendUnavailable: the named backend cannot run this model here.
        InputError: the model does not take such an image.
    """
    model.eval()
    try:
        with precision(config, world.device):
            model(torch.zeros(1, channels, *size_of(config), device=world.device))
    except (TypeError, ValueError) as error:
        raise InputError(f"model {config.model} at {size_of(config)} pixels: {error}") from None


def check_classes(num_classes: int, split: Split) -> None:
    """Raise an InputError if the data has more classes than the head has outputs."""
    if len(split.class_names) > num_classes:
        raise InputError(
            f"num_classes: the data has {len(split.class_names)} classes, the model's head only "
            f"{num_classes}; raise --num-classes or choose other data"
        )


def describe_device(device: torch.device) -> str:
    """A device for people: the GPU's name, or the CPU and its threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def backend_lines(device: torch.device, config: RunConfig) -> Iterator[str]:
    """Which backend serves each operation on ``device``, and why."""
    named = None if config.fused_kernels == "auto" else config.fused_kernels
    dtype = torch.float32 if config.amp == "none" else getattr(torch, config.amp)
    for choice in explain(device, named, dtype):
        yield f"  {choice.operation:<20} {choice.backend or 'unavailable':<10} {choice.reason}"
