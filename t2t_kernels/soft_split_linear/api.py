"""Soft split, optional LayerNorm, Linear: the first part of every T2T layer (T2T-ViT, section 3.1)."""

import torch
from torch import Tensor

from t2t_kernels.arguments import (
    autocast_dtype,
    cast,
    check_eps,
    check_parameter,
    check_split,
    check_tensor,
)
from t2t_kernels.backends import choose, requested
from t2t_kernels.library import operators
from t2t_kernels.soft_split_linear import reference
from t2t_kernels.soft_split_linear.ops import SOFT_SPLIT_LINEAR


def soft_split_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Project the tokens of a soft split: ``linear(layer_norm(soft_split(x)))``.

    Under autocast, ``x`` and the parameters are converted as for a matrix product.

    Args:
        x: map (B, C, H, W), float32, float16, bfloat16 or float64, any memory format or strides.
        weight: (O, C·k·k), dtype and device of ``x``.
        bias: (O,) or None.
        norm_weight, norm_bias: (C·k·k,) each, or both None for no norm.
        kernel_size, stride, padding: As in :func:`t2t_kernels.soft_split`.
        eps: Added to the variance of a token.
        backend: A backend, or None for the first available one; see ``docs/backends.md``.

    Returns:
        (B, T, O), contiguous.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, device or shape.
        BackendUnavailable: The named backend cannot run this call.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return soft_split_linear(
                cast(x, dtype),
                cast(weight, dtype),
                cast(bias, dtype),
                cast(norm_weight, dtype),
                cast(norm_bias, dtype),
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                eps=eps,
                backend=backend,
            )
    check_split(x, kernel_size, stride, padding)
    check_eps(eps)
    width = x.shape[1] * kernel_size**2
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (O, {width})")
    check_parameter("weight", weight, (weight.shape[0], width), x)
    if bias is not None:
        check_parameter("bias", bias, weight.shape[:1], x)
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(
            f"{missing}: got None, expected both of norm_weight and norm_bias or neither"
        )
    if norm_weight is not None and norm_bias is not None:
        check_parameter("norm_weight", norm_weight, (width,), x)
        check_parameter("norm_bias", norm_bias, (width,), x)
    tensors = (x, weight, bias, norm_weight, norm_bias)
    sizes = {
        "channels": x.shape[1],
        "kernel_size": kernel_size,
        "stride": stride,
        "outputs": weight.shape[0],
    }
    chosen = choose(SOFT_SPLIT_LINEAR, x.device, x.dtype, backend, sizes, tensors)
    if chosen != "reference":
        return operators(chosen).soft_split_linear(
            x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, eps
        )
    return reference.soft_split_linear(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        eps=eps,
        backend=requested(backend),
    )
