"""The contract of softmax token attention: schemas, fakes and the gradient.

Besides the inputs, the backward needs in float32: the result and, for each query, the maximum of its
scores t = scale·q·k and its normaliser Σ_s e^(t_s − maximum). A result in half precision, or a single
logarithm instead of both statistics, would not be accurate enough: if a query attends to a single key,
the gradients of its scores are differences that cancel. For float32 inputs the second output is empty,
and the result itself is saved. No T×T tensor exists.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.backends import HALF_DTYPES, Kernel, Operation, register
from t2t_kernels.library import declare, no_second_derivative


class Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class BackwardArguments(NamedTuple):
    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    maximum: Tensor
    normalizer: Tensor
    scale: float


def _fake(call: Arguments) -> tuple[Tensor, ...]:
    v = call.v
    shape = (0,) if v.dtype == torch.float32 else v.shape
    return (
        v.new_empty(v.shape),
        v.new_empty(shape, dtype=torch.float32),
        *(v.new_empty(v.shape[:2], dtype=torch.float32) for _ in range(2)),
    )


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, ...]:
    return tuple(call.v.new_empty(call.v.shape) for _ in range(3))


def _setup_context(ctx, call: Arguments, output: tuple[Tensor, ...]) -> None:
    y, attended, maximum, normalizer = output
    attended = y if y.dtype == torch.float32 else attended
    ctx.scale = call.scale
    ctx.save_for_backward(call.q, call.k, call.v, attended, maximum, normalizer)
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_) -> dict[str, Tensor]:
    if grad is None:
        return {}
    grads = ops.token_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dict(zip("qkv", grads, strict=True))


def _flops(call: Any) -> int:
    return flops.token_attention(call.v)


def _backward_flops(call: Any) -> int:
    return 2 * flops.token_attention(call.v)


TOKEN_ATTENTION = register(
    Operation(
        "token_attention",
        kernels={
            "cpu": Kernel(),
            "triton": Kernel(sizes={"E": range(129)}),
            "cuda": Kernel(HALF_DTYPES, {"E": range(64, 65)}),
        },
        cuda_first=HALF_DTYPES,
    )
)

declare(
    "token_attention",
    Arguments,
    "(Tensor y, Tensor attended, Tensor maximum, Tensor normalizer)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "token_attention_backward",
    BackwardArguments,
    "(Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
