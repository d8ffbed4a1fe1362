"""The contract of the transformer T2T layer: schemas, fakes and gradients.

Besides the inputs, the backward needs q and k in the map's dtype and, in float32, the attention's
result and the maximum and normaliser of each query (see ``token_attention``). v is recomputed: the
backward reads the patches anyway, and v is a third of their projection.
"""

from typing import Any, get_type_hints

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.arguments import output_size, split_of
from t2t_kernels.backends import HALF_DTYPES, Kernel, Operation, register
from t2t_kernels.library import declare, named_tuple, no_second_derivative
from t2t_kernels.soft_split_linear.ops import like_map, why_not_a_grid, why_not_projected
from t2t_kernels.transformer_layer.params import TransformerLayerParams

_TENSORS: list[tuple[str, Any]] = [("x", Tensor), *get_type_hints(TransformerLayerParams).items()]
_SAVED: list[tuple[str, Any]] = [
    ("q", Tensor),
    ("k", Tensor),
    ("attended", Tensor),
    ("maximum", Tensor),
    ("normalizer", Tensor),
]
_NUMBERS: list[tuple[str, Any]] = [
    ("kernel_size", int),
    ("stride", int),
    ("padding", int),
    ("scale", float),
]
Arguments = named_tuple("Arguments", _TENSORS + _NUMBERS)
BackwardArguments = named_tuple(
    "BackwardArguments",
    [("grad", Tensor), *_TENSORS, *_SAVED, *_NUMBERS, ("need_x", bool)],
)


def _fake(call: Any) -> tuple[Tensor, ...]:
    x = call.x
    h, w = output_size(x.shape[2], x.shape[3], *split_of(call))
    shape = (x.shape[0], h * w, call.attn_proj_weight.shape[0])
    y, q, k = (x.new_empty(shape) for _ in range(3))
    attended = x.new_empty(shape, dtype=torch.float32)
    statistics = (x.new_empty(shape[:2], dtype=torch.float32) for _ in range(2))
    return y, q, k, attended, *statistics


def _backward_fake(call: Any) -> tuple[Tensor, ...]:
    parameters = (getattr(call, name) for name in TransformerLayerParams._fields)
    return (
        like_map(call.x) if call.need_x else call.x.new_empty(0),
        *(parameter.new_empty(parameter.shape) for parameter in parameters),
    )


def _setup_context(ctx, call: Any, output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.numbers = call[len(_TENSORS) :]
    ctx.save_for_backward(*call[: len(_TENSORS)], *saved)
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_) -> dict[str, Tensor]:
    if grad is None:
        return {}
    need_x = ctx.needs_input_grad[0]
    grad_x, *grads = ops.transformer_layer_backward(grad, *ctx.saved_tensors, *ctx.numbers, need_x)
    grads = dict(zip(TransformerLayerParams._fields, grads, strict=True))
    return ({"x": grad_x} if need_x else {}) | grads


def _flops(call: Any) -> int:
    split, (hidden, embed) = split_of(call), call.mlp_fc1_weight
    v = flops.token_shape(call.x, embed, split)
    return (
        flops.soft_split_linear(call.x, call.attn_qkv_weight, split)
        + flops.token_attention(v)
        + flops.layer_tail(v, hidden)
    )


def _backward_flops(call: Any) -> int:
    split, (hidden, embed) = split_of(call), call.mlp_fc1_weight
    v = flops.token_shape(call.x, embed, split)
    return (
        flops.soft_split_linear_backward(call.x, call.attn_qkv_weight, split, call.need_x)
        + 2 * flops.token_attention(v)
        + 2 * flops.layer_tail(v, hidden)
    )


TRANSFORMER_LAYER = register(
    Operation(
        "transformer_layer",
        kernels={
            "cpu": Kernel(),
            "triton": Kernel(sizes=dict.fromkeys("EM", range(129)), why_not_map=why_not_a_grid),
            "cuda": Kernel(HALF_DTYPES, dict.fromkeys("EM", range(64, 65)), why_not_projected),
        },
        parts=("soft_split_linear", "token_attention"),
        cuda_first=HALF_DTYPES,
    )
)

declare(
    "transformer_layer",
    Arguments,
    "(Tensor y, Tensor q, Tensor k, Tensor attended, Tensor maximum, Tensor normalizer)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "transformer_layer_backward",
    BackwardArguments,
    f"(Tensor, {', '.join(['Tensor'] * len(TransformerLayerParams._fields))})",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
