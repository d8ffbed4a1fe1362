"""The optimiser of a run: which parameters it decays, and how fast each group learns."""

import difflib

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from t2tvit.errors import InputError
from t2tvit.training.config import RunConfig

SECOND_ORDER = "adahessian"  # needs gradients of gradients, which no training step here keeps
FUSED = ("adam", "adamw")  # of torch, in one kernel for all parameters
ADAPTIVE = ("ada", "lamb")  # parts of the names of those that adapt to the gradient's size


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimiser of timm's factory that ``config`` names.

    Raises:
        InputError: there is none of that name, or it does not take its arguments.
    """
    known = [name for name in timm.optim.list_optimizers() if name != SECOND_ORDER]
    if config.optimizer not in known:
        near = difflib.get_close_matches(config.optimizer, known, n=3) or ["adamw", "sgd", "lamb"]
        raise InputError(
            f"optimizer: unknown name {config.optimizer!r}; timm has {', '.join(near)} and more"
        )
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr * config.lr_factor,
            momentum=config.momentum,
            **({"fused": True} if config.optimizer in FUSED else {}),
            param_group_fn=lambda model: parameter_groups(model, config),
        )
    except (AssertionError, ImportError, ValueError) as error:
        raise InputError(f"optimizer {config.optimizer}: {error}") from None


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict]:
    """Trainable parameters by weight decay and ``lr_scale``, which timm's schedules follow."""
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
