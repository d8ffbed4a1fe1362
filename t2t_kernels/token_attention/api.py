"""Softmax attention of a T2T layer: one head, few channels, many tokens (T2T-ViT, section 3.1)."""

import torch
from torch import Tensor

from t2t_kernels.arguments import autocast_dtype, cast, check_parameter, check_tensor
from t2t_kernels.backends import choose
from t2t_kernels.library import operators
from t2t_kernels.token_attention import reference
from t2t_kernels.token_attention.ops import TOKEN_ATTENTION


def check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale: got {scale!r}, expected a number")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale: got {scale}, expected a finite number")


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: str | None = None
) -> Tensor:
    """Non-causal single-head attention: ``softmax(scale · q kᵀ) v``.

    Args:
        q, k, v: (B, T, E) each, with the same dtype: float32, float16, bfloat16 or float64; any strides.
        scale: Factor of the scores. A T2T layer uses n^-0.5, where n is the width of its *input* tokens.
        backend: A backend, or None for the first available one; see ``docs/backends.md``.

    Returns:
        (B, T, E) in the dtype of ``v``; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, device or shape.
        BackendUnavailable: The named backend cannot run this call.
    """
    dtype = autocast_dtype(v)
    if dtype is not None:
        with torch.autocast(v.device.type, enabled=False):
            return token_attention(
                cast(q, dtype), cast(k, dtype), cast(v, dtype), scale=scale, backend=backend
            )
    check_tensor("v", v)
    if v.dim() != 3 or v.shape[1] < 1 or v.shape[2] < 1:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}, expected (B, T, E) with T and E at least 1"
        )
    check_parameter("q", q, v.shape, v, like_name="v")
    check_parameter("k", k, v.shape, v, like_name="v")
    check_scale(scale)
    chosen = choose(TOKEN_ATTENTION, v.device, v.dtype, backend, {"E": v.shape[2]}, (q, k, v))
    if chosen != "reference":
        return operators(chosen).token_attention(q, k, v, scale)[0]
    return reference.token_attention(q, k, v, scale=scale)
