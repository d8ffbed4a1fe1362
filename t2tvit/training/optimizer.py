"""The optimiser of a run and its schedule."""

import difflib
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from t2tvit.errors import InputError
from t2tvit.training.checkpointing.states import is_number
from t2tvit.training.config import OptimizerConfig, RunConfig

SECOND_ORDER = "adahessian"  # needs second derivatives, which the trainer does not compute
# Optimiser state with the shape of its parameter.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
FUSED = ("adam", "adamw")  # fused in torch: one kernel for all parameters


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, from timm's factory.

    Raises:
        InputError: The name is unknown, or the optimiser rejects its arguments.
    """
    known = [str(name) for name in timm.optim.list_optimizers() if name != SECOND_ORDER]
    if config.optimizer not in known:
        near = difflib.get_close_matches(config.optimizer, known, n=3) or ["adamw", "sgd", "lamb"]
        raise InputError(
            f"optimizer: unknown name {config.optimizer!r}; timm has {', '.join(near)} and more"
        )
    options: dict[str, Any] = {"fused": True} if config.optimizer in FUSED else {}
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr * config.lr_factor,
            momentum=config.momentum,
            **options,
            param_group_fn=lambda model: parameter_groups(model, config),
        )
    except (AssertionError, ImportError, ValueError) as error:
        raise InputError(f"optimizer {config.optimizer}: {error}") from None


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Trainable parameters, grouped by weight decay and ``lr_scale``, which timm's schedules use."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if config.layer_decay is not None:
        return param_groups_layer_decay(
            model,
            config.weight_decay,
            no_weight_decay_list=exempt,
            layer_decay=config.layer_decay,
        )
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    if config.backbone_lr_scale == 1:
        return groups
    heads = model.get_classifier()  # distilled models have two
    heads = heads if isinstance(heads, tuple) else (heads,)
    head = {id(parameter) for each in heads for parameter in each.parameters()}
    scaled = []
    for group in groups:
        for is_head, scale in ((True, 1.0), (False, config.backbone_lr_scale)):
            members = [each for each in group["params"] if (id(each) in head) == is_head]
            if members:
                scaled.append(group | {"params": members, "lr_scale": scale})
    return scaled


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, updates_per_epoch: int
) -> tuple[Scheduler, int]:
    """The learning rate schedule, and the number of epochs including cool-down."""
    return create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr * config.lr_factor,
        min_lr=config.min_lr * config.lr_factor,
        cooldown_epochs=config.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )


def check_optimizer(optimizer: torch.optim.Optimizer, before: list[dict]) -> None:
    """Raise a ValueError unless the loaded state fits the parameters and their groups.

    Args:
        optimizer: The optimiser with the loaded state.
        before: Its groups before loading: options that were numbers must still be numbers.
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
                raise ValueError(
                    f"{name} of the optimiser is {new.get(name)!r:.40}, expected a number"
                )
