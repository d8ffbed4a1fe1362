"""The contract of soft split for all compiled backends: schemas, fakes and the gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from t2t_kernels.arguments import output_size, split_of
from t2t_kernels.backends import Kernel, Operation, register
from t2t_kernels.library import declare


class Arguments(NamedTuple):
    x: Tensor
    kernel_size: int
    stride: int
    padding: int


class BackwardArguments(NamedTuple):
    grad: Tensor
    height: torch.SymInt
    width: torch.SymInt
    kernel_size: int
    stride: int
    padding: int
    channels_last: bool


def _fake(call: Arguments) -> Tensor:
    batch, channels, height, width = call.x.shape
    h, w = output_size(height, width, *split_of(call))
    return call.x.new_empty((batch, h * w, channels * call.kernel_size**2))


def _backward_fake(call: BackwardArguments) -> Tensor:
    batch, _, token_width = call.grad.shape
    shape = (batch, token_width // call.kernel_size**2, call.height, call.width)
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=call.grad.dtype, device=call.grad.device, memory_format=layout)


def _setup_context(ctx, call: Arguments, output: Tensor) -> None:
    height, width = call.x.shape[2:]
    # The gradient gets the layout of the map, so that no copy is needed.
    channels_last = call.x.stride(1) == 1 and call.x.shape[1] > 1
    ctx.rest = height, width, *split_of(call), channels_last


def _backward(ops, ctx, grad: Tensor) -> dict[str, Tensor]:
    return {"x": ops.soft_split_backward(grad, *ctx.rest)}


def _setup_context_of_backward(ctx, call: BackwardArguments, output: Tensor) -> None:
    ctx.split = split_of(call)


def _backward_of_backward(ops, ctx, grad_grad: Tensor) -> dict[str, Tensor]:
    # Soft split is linear: the gradient of its adjoint is soft split itself.
    return {"grad": ops.soft_split(grad_grad, *ctx.split)}


SOFT_SPLIT = register(
    Operation("soft_split", kernels={"cpu": Kernel(), "triton": Kernel(), "cuda": Kernel()})
)

declare(
    "soft_split",
    Arguments,
    "Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
declare(
    "soft_split_backward",
    BackwardArguments,
    "Tensor",
    fake=_backward_fake,
    setup_context=_setup_context_of_backward,
    backward=_backward_of_backward,
)
