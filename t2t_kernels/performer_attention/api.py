"""Performer attention with positive random features, one head (Performers; T2T-ViT, section 3.1)."""

import torch
from torch import Tensor

from t2t_kernels.arguments import (
    autocast_dtype,
    cast,
    check_eps,
    check_parameter,
    check_tensor,
)
from t2t_kernels.backends import choose
from t2t_kernels.library import operators
from t2t_kernels.performer_attention import reference
from t2t_kernels.performer_attention.ops import PERFORMER_ATTENTION


def performer_attention(
    k: Tensor, q: Tensor, v: Tensor, w: Tensor, *, eps: float = 1e-8, backend: str | None = None
) -> Tensor:
    """Linear attention: y = φ(q)·(Σ φ(k) vᵀ) / (φ(q)·Σ φ(k) + eps), φ(x) = exp(w·x − |x|²/2)/√m.

    It is computed in float32 (float64 for float64 inputs) and finite for all finite q and k. Note the
    argument order: k, q, v.

    Args:
        k, q, v: (B, T, E) each, with the same dtype: float32, float16, bfloat16 or float64; any strides.
        w: Random features (m, E), any floating dtype. They are constant and receive no gradient.
        eps: Added to the normaliser. Published checkpoints were trained with 1e-8, which suppresses
            the attention if |q| and |k| are large. 0 is safe in this implementation and the robust
            choice for new training.
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
            return performer_attention(
                cast(k, dtype), cast(q, dtype), cast(v, dtype), w, eps=eps, backend=backend
            )
    check_tensor("v", v)
    if v.dim() != 3 or v.shape[1] < 1 or v.shape[2] < 1:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}, expected (B, T, E) with T and E at least 1"
        )
    check_parameter("k", k, v.shape, v, like_name="v")
    check_parameter("q", q, v.shape, v, like_name="v")
    check_random_features(w, v.shape[2], v)
    check_eps(eps)
    sizes = {"E": w.shape[1], "m": w.shape[0]}
    chosen = choose(PERFORMER_ATTENTION, v.device, v.dtype, backend, sizes, (k, q, v))
    if chosen != "reference":
        return operators(chosen).performer_attention(k, q, v, w, eps)[0]
    return reference.performer_attention(k, q, v, w, eps=eps)


def check_random_features(w: Tensor, width: int, like: Tensor) -> None:
    """Check the random features (m, ``width``), of any floating dtype, on the device of ``like``."""
    check_tensor("w", w)
    if w.dim() != 2 or w.shape[0] < 1 or w.shape[1] != width:
        raise ValueError(f"w: got shape {tuple(w.shape)}, expected (m, {width}) with m at least 1")
    if w.device != like.device:
        raise ValueError(f"w: got device {w.device}, expected {like.device}")
