"""The contract of soft split: schemas, fakes and the gradient, common to all compiled backends."""

import torch
from torch import Tensor

from t2t_kernels.arguments import output_size
from t2t_kernels.backends import register_operation
from t2t_kernels.library import declare


def _soft_split_fake(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    batch, channels, height, width = x.shape
    h, w = output_size(height, width, kernel_size, stride, padding)
    return x.new_empty((batch, h * w, channels * kernel_size**2))


def _soft_split_backward_fake(
    grad: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    padding: int,
    channels_last: bool,
) -> Tensor:
    shape = (grad.shape[0], grad.shape[2] // kernel_size**2, height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.kernel_size, ctx.stride, ctx.padding = inputs
    ctx.height, ctx.width = x.shape[2:]
    # The gradient comes back in the layout of the map, so that no copy follows it.
    ctx.channels_last = x.stride(1) == 1 and x.shape[1] > 1


def _backward(ops, ctx, grad: Tensor):
    grad_x = ops.soft_split_backward(
        grad, ctx.height, ctx.width, ctx.kernel_size, ctx.stride, ctx.padding, ctx.channels_last
    )
    return grad_x, None, None, None


def _setup_context_of_backward(ctx, inputs, output) -> None:
    _, _, _, ctx.kernel_size, ctx.stride, ctx.padding, _ = inputs


def _backward_of_backward(ops, ctx, grad_grad: Tensor):
    # Soft split is linear: the gradient of its adjoint is soft split itself.
    split = ops.soft_split(grad_grad, ctx.kernel_size, ctx.stride, ctx.padding)
    return split, None, None, None, None, None, None


SOFT_SPLIT = register_operation("soft_split", kernels=("cpu", "triton", "cuda"))

declare(
    "soft_split",
    "(Tensor x, int kernel_size, int stride, int padding) -> Tensor",
    fake=_soft_split_fake,
    setup_context=_setup_context,
    backward=_backward,
)
declare(
    "soft_split_backward",
    "(Tensor grad, SymInt height, SymInt width, int kernel_size, int stride, int padding, "
    "bool channels_last) -> Tensor",
    fake=_soft_split_backward_fake,
    setup_context=_setup_context_of_backward,
    backward=_backward_of_backward,
)
