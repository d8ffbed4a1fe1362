"""The T2T layer with softmax attention (T2T-ViT, section 3.1)."""

import torch
from torch import Tensor

from t2t_kernels.arguments import (
    autocast_dtype,
    cast,
    check_params,
    check_shapes,
    check_split,
    rows_of,
)
from t2t_kernels.backends import choose, requested
from t2t_kernels.library import operators
from t2t_kernels.token_attention.api import check_scale
from t2t_kernels.transformer_layer import reference
from t2t_kernels.transformer_layer.ops import TRANSFORMER_LAYER
from t2t_kernels.transformer_layer.params import TransformerLayerParams


def transformer_layer(
    x: Tensor,
    params: TransformerLayerParams,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """T2T layer with softmax attention.

    qkv = linear(norm1(soft_split(x))), no bias; a = v + proj(softmax(scale · q kᵀ) v);
    out = a + mlp(norm2(a)), mlp = linear, exact GELU, linear; both norms with eps 1e-5.

    Args:
        x: map (B, C, H, W), float32, float16, bfloat16 or float64, any memory format or strides.
        params: The layer's tensors, in the dtype and on the device of ``x``. Under autocast they are
            converted as for a matrix product.
        kernel_size, stride, padding: As in :func:`t2t_kernels.soft_split`.
        scale: Factor of the scores; T2T-ViT uses (C·k·k)^-0.5, where C·k·k is the width of the input
            tokens.
        backend: A backend, or None for the first available one; see ``docs/backends.md``.

    Returns:
        (B, T, E). Viewed as (B, h, w, E), it is a channels-last map for the next layer.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, device or shape.
        BackendUnavailable: The named backend cannot run this call.
    """
    check_params(params, TransformerLayerParams)
    dtype = autocast_dtype(x)
    if dtype is not None:
        converted = TransformerLayerParams(*(cast(tensor, dtype) for tensor in params))
        with torch.autocast(x.device.type, enabled=False):
            return transformer_layer(
                cast(x, dtype),
                converted,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                scale=scale,
                backend=backend,
            )
    check_split(x, kernel_size, stride, padding)
    _check_params(params, x, x.shape[1] * kernel_size**2)
    check_scale(scale)
    sizes = params.sizes(x.shape[1], kernel_size, stride)
    chosen = choose(TRANSFORMER_LAYER, x.device, x.dtype, backend, sizes, (x, *params))
    if chosen != "reference":
        numbers = kernel_size, stride, padding, scale
        return operators(chosen).transformer_layer(x, *params, *numbers)[0]
    return reference.transformer_layer(
        x,
        params,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        scale=scale,
        backend=requested(backend),
    )


def _check_params(params: TransformerLayerParams, x: Tensor, width: int) -> None:
    embed, hidden = rows_of(params, "attn_proj_weight"), rows_of(params, "mlp_fc1_weight")
    check_shapes(
        params,
        x,
        norm1_weight=(width,),
        norm1_bias=(width,),
        attn_qkv_weight=(3 * embed, width),
        attn_proj_weight=(embed, embed),
        attn_proj_bias=(embed,),
        norm2_weight=(embed,),
        norm2_bias=(embed,),
        mlp_fc1_weight=(hidden, embed),
        mlp_fc1_bias=(hidden,),
        mlp_fc2_weight=(embed, hidden),
        mlp_fc2_bias=(embed,),
    )
