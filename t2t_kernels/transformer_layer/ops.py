"""The contract of the transformer T2T layer: schemas, fakes and gradients.

Saved for the backward, besides the inputs: q and k in the map's dtype and, in float32, the attention's
result and each query's maximum and normaliser (see ``token_attention``). v is projected again: the
backward reads the patches anyway, and v is a third of their projection.
"""

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.arguments import output_size
from t2t_kernels.backends import HALF_DTYPES, register_operation
from t2t_kernels.library import declare, no_second_derivative
from t2t_kernels.soft_split_linear.ops import like_map, why_not_projected

_TENSORS = (
    "Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor attn_qkv_weight, "
    "Tensor attn_proj_weight, Tensor attn_proj_bias, Tensor norm2_weight, Tensor norm2_bias, "
    "Tensor mlp_fc1_weight, Tensor mlp_fc1_bias, Tensor mlp_fc2_weight, Tensor mlp_fc2_bias"
)
_NUMBERS = "int kernel_size, int stride, int padding, float scale"


def _fake(x, *rest) -> tuple[Tensor, ...]:
    proj_weight, (kernel_size, stride, padding) = rest[3], rest[-4:-1]
    h, w = output_size(x.shape[2], x.shape[3], kernel_size, stride, padding)
    shape = (x.shape[0], h * w, proj_weight.shape[0])
    y, q, k = (x.new_empty(shape) for _ in range(3))
    attended = x.new_empty(shape, dtype=torch.float32)
    statistics = (x.new_empty(shape[:2], dtype=torch.float32) for _ in range(2))
    return y, q, k, attended, *statistics


def _backward_fake(grad, x, *rest) -> tuple[Tensor, ...]:
    need_x = rest[-1]
    return (
        like_map(x) if need_x else x.new_empty(0),
        *(parameter.new_empty(parameter.shape) for parameter in rest[:11]),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, kernel_size, stride, padding, scale = inputs
    ctx.numbers = kernel_size, stride, padding, scale
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 16
    need_x = ctx.needs_input_grad[0]
    grad_x, *grads = ops.transformer_layer_backward(grad, *ctx.saved_tensors, *ctx.numbers, need_x)
    return grad_x if need_x else None, *grads, *(None,) * 4


def _flops(x, *rest) -> int:
    qkv_weight, fc1_weight, split = rest[2], rest[7], rest[-4:-1]
    v = flops.token_shape(x, fc1_weight[1], split)
    return (
        flops.soft_split_linear(x, qkv_weight, split)
        + flops.token_attention(v)
        + flops.layer_tail(v, fc1_weight[0])
    )


def _backward_flops(grad, x, *rest) -> int:
    qkv_weight, fc1_weight, split, need_x = rest[2], rest[7], rest[-5:-2], rest[-1]
    v = flops.token_shape(x, fc1_weight[1], split)
    return (
        flops.soft_split_linear_backward(x, qkv_weight, split, need_x)
        + 2 * flops.token_attention(v)
        + 2 * flops.layer_tail(v, fc1_weight[0])
    )


TRANSFORMER_LAYER = register_operation(
    "transformer_layer",
    kernels=("cpu", "triton", "cuda"),
    parts=("soft_split_linear", "token_attention"),
    sizes={
        "triton": dict.fromkeys("EM", range(129)),
        "cuda": dict.fromkeys("EM", range(64, 65)),
    },
    dtypes={"cuda": HALF_DTYPES},
    why_not_map={"cuda": why_not_projected},
)

declare(
    "transformer_layer",
    f"({_TENSORS}, {_NUMBERS}) "
    "-> (Tensor y, Tensor q, Tensor k, Tensor attended, Tensor maximum, Tensor normalizer)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "transformer_layer_backward",
    f"(Tensor grad, {_TENSORS}, Tensor q, Tensor k, Tensor attended, Tensor maximum, "
    f"Tensor normalizer, {_NUMBERS}, bool need_x) -> ({', '.join(['Tensor'] * 12)})",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
