"""The contract of Performer attention: schemas, fakes and the gradient.

Besides the inputs, the backward needs, per image and feature: the maximum c of the keys' log-features
a, the normaliser Z = Σ e^(a − c) and the sums S = Σ e^(a − c) v, in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.backends import HALF_DTYPES, Kernel, Operation, register
from t2t_kernels.library import declare, no_second_derivative


class Arguments(NamedTuple):
    k: Tensor
    q: Tensor
    v: Tensor
    w: Tensor
    eps: float


class BackwardArguments(NamedTuple):
    grad: Tensor
    k: Tensor
    q: Tensor
    v: Tensor
    w: Tensor
    maximum: Tensor
    normalizer: Tensor
    sums: Tensor
    eps: float


def _fake(call: Arguments) -> tuple[Tensor, ...]:
    v, (batch, _, embed), features = call.v, call.v.shape, call.w.shape[0]
    return (
        v.new_empty(v.shape),
        v.new_empty((batch, features), dtype=torch.float32),
        v.new_empty((batch, features), dtype=torch.float32),
        v.new_empty((batch, features, embed), dtype=torch.float32),
    )


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, ...]:
    return tuple(call.v.new_empty(call.v.shape) for _ in range(3))


def _setup_context(ctx, call: Arguments, output: tuple[Tensor, ...]) -> None:
    _, maximum, normalizer, sums = output
    ctx.eps = call.eps
    ctx.save_for_backward(call.k, call.q, call.v, call.w, maximum, normalizer, sums)
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_) -> dict[str, Tensor]:
    if grad is None:
        return {}
    grads = ops.performer_attention_backward(grad, *ctx.saved_tensors, ctx.eps)
    return dict(zip("kqv", grads, strict=True))


def _flops(call: Any) -> int:
    return flops.performer_attention(call.v, call.w[0])


def _backward_flops(call: Any) -> int:
    return flops.performer_attention_backward(call.v, call.w[0])


PERFORMER_ATTENTION = register(
    Operation(
        "performer_attention",
        kernels={
            "cpu": Kernel(),
            "triton": Kernel(sizes=dict.fromkeys("Em", range(129))),
            "cuda": Kernel(HALF_DTYPES, {"E": range(64, 65), "m": range(32, 33)}),
        },
        cuda_first=HALF_DTYPES,
    )
)

declare(
    "performer_attention",
    Arguments,
    "(Tensor y, Tensor maximum, Tensor normalizer, Tensor sums)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "performer_attention_backward",
    BackwardArguments,
    "(Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
