"""The T2T layer with Performer attention (T2T-ViT, section 3.1)."""

import torch
from torch import Tensor

from t2t_kernels.arguments import (
    autocast_dtype,
    cast,
    check_eps,
    check_params,
    check_shapes,
    check_split,
    rows_of,
)
from t2t_kernels.backends import choose, requested
from t2t_kernels.library import operators
from t2t_kernels.performer_attention.api import check_random_features
from t2t_kernels.performer_layer import reference
from t2t_kernels.performer_layer.ops import PERFORMER_LAYER
from t2t_kernels.performer_layer.params import PerformerLayerParams
from t2t_kernels.philox import signed


def performer_layer(
    x: Tensor,
    params: PerformerLayerParams,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float = 1e-8,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """T2T layer with Performer attention.

    kqv = linear(norm1(soft_split(x))); a = v + dropout(proj(performer_attention(k, q, v)));
    out = a + dropout(mlp(norm2(a))), mlp = linear, exact GELU, linear; both norms with eps 1e-5.

    Args:
        x: map (B, C, H, W), float32, float16, bfloat16 or float64, any memory format or strides.
        params: The layer's tensors, in the dtype and on the device of ``x``; ``w`` in any floating
            dtype. Under autocast they are converted as for a matrix product, except ``w``.
        kernel_size, stride, padding: As in :func:`t2t_kernels.soft_split`.
        eps: As in :func:`t2t_kernels.performer_attention`.
        dropout_p: Probability of both dropouts, 0 to 1; with a seed it is rounded to a multiple of
            2⁻¹⁶. Pass 0 in evaluation.
        seed: Seed of the dropout masks, an integer, of which 64 bits are used, or an int64 tensor of
            one element (a compiled graph is specialised to an integer, but not to a tensor). None
            uses PyTorch's generator.
        backend: A backend, or None for the first available one; see ``docs/backends.md``.

    Returns:
        (B, T, E). Viewed as (B, h, w, E), it is a channels-last map for the next layer.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, device or shape.
        BackendUnavailable: The named backend cannot run this call.
    """
    check_params(params, PerformerLayerParams)
    dtype = autocast_dtype(x)
    if dtype is not None:
        converted = PerformerLayerParams(*(cast(tensor, dtype) for tensor in params))
        with torch.autocast(x.device.type, enabled=False):
            return performer_layer(
                cast(x, dtype),
                converted._replace(w=params.w),
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                eps=eps,
                dropout_p=dropout_p,
                seed=seed,
                backend=backend,
            )
    check_split(x, kernel_size, stride, padding)
    _check_params(params, x, x.shape[1] * kernel_size**2)
    check_eps(eps)
    _check_dropout(dropout_p, seed)
    sizes = params.sizes(x.shape[1], kernel_size, stride)
    chosen = choose(PERFORMER_LAYER, x.device, x.dtype, backend, sizes, (x, *params))
    if chosen != "reference":
        seed = _seed_tensor(seed, x.device) if dropout_p > 0 else None
        numbers = kernel_size, stride, padding, eps, dropout_p
        return operators(chosen).performer_layer(x, *params, seed, *numbers)[0]
    return reference.performer_layer(
        x,
        params,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        backend=requested(backend),
    )


def _check_params(params: PerformerLayerParams, x: Tensor, width: int) -> None:
    embed, hidden = rows_of(params, "proj_weight"), rows_of(params, "mlp_0_weight")
    check_shapes(
        params,
        x,
        norm1_weight=(width,),
        norm1_bias=(width,),
        kqv_weight=(3 * embed, width),
        kqv_bias=(3 * embed,),
        proj_weight=(embed, embed),
        proj_bias=(embed,),
        norm2_weight=(embed,),
        norm2_bias=(embed,),
        mlp_0_weight=(hidden, embed),
        mlp_0_bias=(hidden,),
        mlp_2_weight=(embed, hidden),
        mlp_2_bias=(embed,),
    )
    check_random_features(params.w, embed, x)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a tensor on the device, so that a captured graph can use a new one each time."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((1,), signed(seed), dtype=torch.int64, device=device)


def _check_dropout(dropout_p: float, seed: int | Tensor | None) -> None:
    if not isinstance(dropout_p, (int, float)) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p: got {dropout_p!r}, expected a number")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability from 0 to 1")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed: got a tensor of {seed.dtype} and shape {tuple(seed.shape)}, expected int64 "
                "and one element"
            )
    elif seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed: got {seed!r}, expected an integer, an int64 tensor or None")
