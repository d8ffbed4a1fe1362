"""The contract of softmax token attention: schemas, fakes and the gradient.

Saved for the backward, besides the inputs, all in float32: the result and, of each query, the maximum
of its scores t = scale·q·k and its normaliser Σ_s e^(t_s − maximum). A result in half precision would
not do, nor one logarithm of the normaliser: where a query attends to one key, its scores' gradients
are differences that cancel. Where the inputs are float32 the second output is empty, and the result
itself is saved. No T×T tensor exists.
"""

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.backends import HALF_DTYPES, register_operation
from t2t_kernels.library import declare, no_second_derivative


def _fake(q, k, v, scale) -> tuple[Tensor, ...]:
    shape = (0,) if v.dtype == torch.float32 else v.shape
    return (
        v.new_empty(v.shape),
        v.new_empty(shape, dtype=torch.float32),
        *(v.new_empty(v.shape[:2], dtype=torch.float32) for _ in range(2)),
    )


def _backward_fake(grad, q, k, v, attended, maximum, normalizer, scale) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(v.shape) for _ in range(3))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    y, attended, *statistics = output
    attended = y if y.dtype == torch.float32 else attended
    ctx.save_for_backward(*tensors, attended, *statistics)
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 4
    return *ops.token_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _flops(q, k, v, scale) -> int:
    return flops.token_attention(v)


def _backward_flops(grad, q, k, v, *_) -> int:
    return 2 * flops.token_attention(v)


TOKEN_ATTENTION = register_operation(
    "token_attention",
    kernels=("cpu", "triton", "cuda"),
    sizes={"triton": {"E": range(129)}, "cuda": {"E": range(64, 65)}},
    dtypes={"cuda": HALF_DTYPES},
)

declare(
    "token_attention",
    "(Tensor q, Tensor k, Tensor v, float scale) "
    "-> (Tensor y, Tensor attended, Tensor maximum, Tensor normalizer)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "token_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor attended, Tensor maximum, Tensor normalizer, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
