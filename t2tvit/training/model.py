"""The model of a run: building it, checking that it works, describing it in the log."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from t2t_kernels.backends import Choice, explain
from t2tvit.data.sources import Split
from t2tvit.errors import InputError
from t2tvit.files import memory_size
from t2tvit.models import T2TBackbone, create_model, load_checkpoint
from t2tvit.models.checkpoint import check_fit, read_state_dict
from t2tvit.models.t2t_module import T2TModule
from t2tvit.models.timm_models import TIMM, create_timm_model
from t2tvit.training.checkpointing import read_about
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World


def trainable_model(
    config: RunConfig, split: Split, world: World, begins: bool
) -> tuple[nn.Module, dict]:
    """The model of a run on ``split``, checked to work, and the arguments to rebuild it.

    ``initial_checkpoint`` is read if the run ``begins``, not if it is resumed.

    Raises:
        BackendUnavailable: The named backend cannot run this model here.
        InputError: The model does not fit the data or the other options.
    """
    args = config.create_args(len(split.class_names), split.channels)
    model = build_model(config.model, args, config.fused_kernels)
    check_classes(model.num_classes, split)
    if begins and config.initial_checkpoint is not None:
        begin_from(model, Path(config.initial_checkpoint), split.class_names)
    model.to(world.device)
    try_forward(model, config, split.channels, world.device)
    try_batch_norm(model, config, split.channels, world)
    speed_up(model, config)
    return model, args


def build_model(name: str, args: dict, fused_kernels: str) -> nn.Module:
    """Create one of our models or ``timm:NAME``; invalid arguments raise an InputError."""
    try:
        if name.startswith(TIMM):
            return _build_timm_model(name, args, fused_kernels)
        check_memory(name, args)
        return create_model(name, fused_kernels=fused_kernels, **args)
    except InputError:
        raise
    except (MemoryError, TypeError, ValueError) as error:
        raise InputError(f"model {name} with {args}: {error}") from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise InputError(f"model {name} with {args} needs more memory than is available") from None


def check_memory(name: str, args: dict) -> None:
    """Raise an InputError if the parameters of one of our models do not fit in memory."""
    with torch.device("meta"):
        model = create_model(name, **args)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size > memory_size():
        raise InputError(
            f"model {name} with {args}: its parameters need {size / 2**30:,.0f} GiB, and this machine "
            f"has {memory_size() / 2**30:,.0f} GiB of memory"
        )


def _build_timm_model(name: str, args: dict, fused_kernels: str) -> nn.Module:
    if fused_kernels not in ("auto", "reference"):
        raise InputError(f"fused_kernels: got {fused_kernels!r}, but {name} has no fused kernels")
    return create_timm_model(name, **args)


def load_weights(model: nn.Module, path: Path, *, new_head: bool = True) -> None:
    """Load a checkpoint into a model of :func:`build_model`; ``new_head`` as in ``load_checkpoint``.

    Raises:
        InputError: The file is missing or damaged, or holds another model's weights.
    """
    if isinstance(model, T2TBackbone):
        load_checkpoint(model, path, new_head=new_head)
        return
    _, state = read_state_dict(path)
    check_fit(state, model.state_dict(), path)
    model.load_state_dict(state)


def begin_from(model: nn.Module, path: Path, class_names: list[str]) -> None:
    """Load the weights of ``path``; create a new head if its classes are not ``class_names``."""
    if not path.exists():
        raise InputError(
            f"initial_checkpoint: {path} does not exist; give the weights to start from as --init FILE"
        )
    load_weights(model, path)
    about = read_about(path)
    if about is not None and about.class_names not in (None, class_names):
        model.reset_classifier(model.num_classes)


@torch.no_grad()
def try_forward(model: nn.Module, config: RunConfig, channels: int, device: torch.device) -> None:
    """Run one blank image, so that errors are found before anything is written.

    Raises:
        BackendUnavailable: The named backend cannot run this model here.
        InputError: The model does not accept images of this size.
    """
    model.eval()
    try:
        with config.autocast(device):
            model(torch.zeros(1, channels, *config.size, device=device))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"model {config.model} at {config.size} pixels: {error}") from None


def try_batch_norm(model: nn.Module, config: RunConfig, channels: int, world: World) -> None:
    """If batches can be single images, try one: batch norm may need more than one.

    Raises:
        InputError: The model cannot train on a single image.
    """
    if config.batch_per_process(world.size) // config.accumulate > 1:
        return
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    trial = copy.deepcopy(model).train()
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), config.autocast(world.device):
        try:
            trial(torch.zeros(1, channels, *config.size, device=world.device))
        except ValueError as error:
            other = "" if config.accumulate == 1 else f" or lower --accumulate {config.accumulate}"
            raise InputError(
                f"batch_size: got {config.batch_size}, too few images at once for {config.model} "
                f"to train on; raise --batch-size{other} ({error})"
            ) from None


def speed_up(model: nn.Module, config: RunConfig) -> None:
    """Apply ``channels_last``, ``grad_checkpointing`` and ``compile``; state-dict keys do not change.

    Raises:
        InputError: The model has no gradient checkpointing.
    """
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise InputError(f"grad_checkpointing: {config.model} does not support it") from None
    if config.compile != "none":
        # In place, so that DistributedDataParallel around it still overlaps its all-reduce.
        model.compile(fullgraph=True, dynamic=False, mode=config.compile)


def check_classes(num_classes: int, split: Split) -> None:
    """Raise an InputError if the data has more classes than the head has outputs."""
    if len(split.class_names) > num_classes:
        raise InputError(
            f"num_classes: the data has {len(split.class_names)} classes, the model's head only "
            f"{num_classes}; raise --num-classes or choose other data"
        )


def backend_lines(model: nn.Module, config: RunConfig, device: torch.device) -> Iterator[str]:
    """The backend of each operation that ``model`` calls on ``device``, its layers, and why."""
    named = None if config.fused_kernels == "auto" else config.fused_kernels
    layers: dict[Choice, list[str]] = {}
    for module in model.modules():
        if isinstance(module, T2TModule):
            for layer, calls in module.calls().items():
                for choice in explain(device, named, config.dtype, calls):
                    layers.setdefault(choice, []).append(layer)
    if not layers:
        yield f"  {config.model} has no fused kernels"
    for choice, names in layers.items():
        backend = choice.backend or "unavailable"
        yield f"  {choice.operation:<20} {backend:<10} {', '.join(names)}: {choice.reason}"
