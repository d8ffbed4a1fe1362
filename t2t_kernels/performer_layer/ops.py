"""The contract of the Performer T2T layer: schemas, fakes and gradients.

Saved for the backward, besides the inputs, and no token's worth of anything: per image and feature the
maximum, normaliser and sums of ``performer_attention``. The dropouts' masks follow from the seed.
"""

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.arguments import output_size
from t2t_kernels.backends import HALF_DTYPES, register_operation
from t2t_kernels.library import declare, no_second_derivative
from t2t_kernels.soft_split_linear.ops import like_map, why_not_projected

_TENSORS = (
    "Tensor x, Tensor w, Tensor norm1_weight, Tensor norm1_bias, Tensor kqv_weight, Tensor kqv_bias, "
    "Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias, "
    "Tensor mlp_0_weight, Tensor mlp_0_bias, Tensor mlp_2_weight, Tensor mlp_2_bias, Tensor? seed"
)
_NUMBERS = "int kernel_size, int stride, int padding, float eps, float dropout_p"


def _fake(x, w, *rest) -> tuple[Tensor, ...]:
    proj_weight, (kernel_size, stride, padding) = rest[4], rest[-5:-2]
    batch, features, embed = x.shape[0], w.shape[0], proj_weight.shape[0]
    h, width = output_size(x.shape[2], x.shape[3], kernel_size, stride, padding)
    return (
        x.new_empty((batch, h * width, embed)),
        x.new_empty((batch, features), dtype=torch.float32),
        x.new_empty((batch, features), dtype=torch.float32),
        x.new_empty((batch, features, embed), dtype=torch.float32),
    )


def _backward_fake(grad, x, w, *rest) -> tuple[Tensor, ...]:
    need_x = rest[-1]
    return (
        like_map(x) if need_x else x.new_empty(0),
        *(parameter.new_empty(parameter.shape) for parameter in rest[:12]),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, seed, kernel_size, stride, padding, eps, dropout_p = inputs
    ctx.numbers = kernel_size, stride, padding, eps, dropout_p
    ctx.save_for_backward(*tensors, seed, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 20
    need_x = ctx.needs_input_grad[0]
    grad_x, *grads = ops.performer_layer_backward(grad, *ctx.saved_tensors, *ctx.numbers, need_x)
    return grad_x if need_x else None, None, *grads, *(None,) * 6


def _flops(x, w, *rest) -> int:
    kqv_weight, mlp_0_weight, split = rest[2], rest[8], rest[-5:-2]
    v = flops.token_shape(x, w[1], split)
    return (
        flops.soft_split_linear(x, kqv_weight, split)
        + flops.performer_attention(v, w[0])
        + flops.layer_tail(v, mlp_0_weight[0])
    )


def _backward_flops(grad, x, w, *rest) -> int:
    kqv_weight, mlp_0_weight, split, need_x = rest[2], rest[8], rest[-6:-3], rest[-1]
    v = flops.token_shape(x, w[1], split)
    return (
        flops.soft_split_linear_backward(x, kqv_weight, split, need_x)
        + flops.performer_attention_backward(v, w[0])
        + 2 * flops.layer_tail(v, mlp_0_weight[0])
    )


PERFORMER_LAYER = register_operation(
    "performer_layer",
    kernels=("cpu", "triton", "cuda"),
    parts=("soft_split_linear", "performer_attention"),
    sizes={
        "triton": dict.fromkeys("EmM", range(129)),
        "cuda": {"E": range(64, 65), "m": range(32, 33), "M": range(64, 65)},
    },
    dtypes={"cuda": HALF_DTYPES},
    why_not_map={"cuda": why_not_projected},
)

declare(
    "performer_layer",
    f"({_TENSORS}, {_NUMBERS}) -> (Tensor y, Tensor maximum, Tensor normalizer, Tensor sums)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "performer_layer_backward",
    f"(Tensor grad, {_TENSORS}, Tensor maximum, Tensor normalizer, Tensor sums, "
    f"{_NUMBERS}, bool need_x) -> ({', '.join(['Tensor'] * 13)})",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
