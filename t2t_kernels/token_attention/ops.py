"""The contract of softmax token attention: schemas, fakes and the gradient.

Saved for the backward, besides the inputs and the result: the logarithm of each query's normaliser,
log Σ_s e^(scale·q·k_s), in float32. No T×T tensor exists.
"""

import torch
from torch import Tensor

from t2t_kernels.backends import register_operation
from t2t_kernels.library import declare, no_second_derivative


def _fake(q, k, v, scale) -> tuple[Tensor, ...]:
    return v.new_empty(v.shape), v.new_empty(v.shape[:2], dtype=torch.float32)


def _backward_fake(grad, q, k, v, y, log_sum_exp, scale) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(v.shape) for _ in range(3))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 4
    return *ops.token_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


TOKEN_ATTENTION = register_operation("token_attention")

declare(
    "token_attention",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor y, Tensor log_sum_exp)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
declare(
    "token_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor log_sum_exp, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
)
