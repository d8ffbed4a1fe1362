"""The contract of Performer attention: schemas, fakes and the gradient.

Saved for the backward, besides the inputs: per image and feature the maximum c of the keys'
log-features, the normaliser Z = Σ e^(a − c) and the sums S = Σ e^(a − c) v, in float32.
"""

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.backends import HALF_DTYPES, register_operation
from t2t_kernels.library import declare, no_second_derivative


def _fake(k, q, v, w, eps) -> tuple[Tensor, ...]:
    batch, tokens, embed = v.shape
    features = w.shape[0]
    return (
        v.new_empty((batch, tokens, embed)),
        v.new_empty((batch, features), dtype=torch.float32),
        v.new_empty((batch, features), dtype=torch.float32),
        v.new_empty((batch, features, embed), dtype=torch.float32),
    )


def _backward_fake(grad, k, q, v, w, maximum, normalizer, sums, eps) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(v.shape) for _ in range(3))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 5
    grads = ops.performer_attention_backward(grad, *ctx.saved_tensors, ctx.eps)
    return *grads, None, None


def _flops(k, q, v, w, eps) -> int:
    return flops.performer_attention(v, w[0])


def _backward_flops(grad, k, q, v, w, *_) -> int:
    return flops.performer_attention_backward(v, w[0])


PERFORMER_ATTENTION = register_operation(
    "performer_attention",
    kernels=("cpu", "triton", "cuda"),
    sizes={
        "triton": dict.fromkeys("Em", range(129)),
        "cuda": {"E": range(64, 65), "m": range(32, 33)},
    },
    dtypes={"cuda": HALF_DTYPES},
)

declare(
    "performer_attention",
    "(Tensor k, Tensor q, Tensor v, Tensor w, float eps) "
    "-> (Tensor y, Tensor maximum, Tensor normalizer, Tensor sums)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "performer_attention_backward",
    "(Tensor grad, Tensor k, Tensor q, Tensor v, Tensor w, Tensor maximum, Tensor normalizer, "
    "Tensor sums, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
