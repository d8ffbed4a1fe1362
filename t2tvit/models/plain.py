"""Checks whether a fused operation may replace a submodule."""

import functools
import warnings

import torch
from torch import nn
from torch.nn.modules import module as torch_module


def why_not_plain(
    name: str, module: nn.Module, kind: type[nn.Module], *, bias: bool | None = True
) -> str | None:
    """The reason why a fused operation cannot replace ``module``; None if it can.

    Args:
        name: The module's name, for the reason.
        kind: The class that the operation computes, with PyTorch's defaults.
        bias: Whether a linear module must or must not have a bias; None if both are allowed.
    """
    # A parametrised module has a class of its own, derived from the original one.
    if type(module) is not kind and not (
        type(module).__base__ is kind and hasattr(module, "parametrizations")
    ):
        return f"{name} is a {type(module).__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks"
    if torch_module._has_any_global_hook():
        return "global module hooks are registered"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    if kind is nn.LayerNorm:
        if module.eps != 1e-5:
            return f"{name} has eps {module.eps}"
        if module.weight is None or module.bias is None:
            return f"{name} has no weight or no bias"
    if kind is nn.GELU and module.approximate != "none":
        return f"{name} is approximate"
    if kind is nn.Linear:
        if bias is not None and bias != (module.bias is not None):
            return f"{name} has {'no' if bias else 'a'} bias"
        # Quantised or distributed weights implement their own linear. A parametrised weight is not
        # stored, and computing it here would run its parametrisation again.
        stored = type(module._parameters.get("weight"))
        if hasattr(stored, "__tensor_flatten__"):
            return f"{name} has a weight of type {stored.__name__}"
    return None


def announce(reason: str, backend: str | None) -> None:
    """Warn once per process and reason that a layer is not fused. There is no warning while a graph is
    captured, and for the reference, which has no fused kernels."""
    if backend != "reference" and not torch.compiler.is_compiling():
        _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"a T2T layer calls its submodules one by one instead of its fused kernel: {reason}",
        stacklevel=5,
    )
