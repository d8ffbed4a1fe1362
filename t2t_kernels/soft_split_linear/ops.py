"""The contract of soft split + LayerNorm + Linear: schemas, fakes and the gradient.

Only the inputs are saved. The backward returns the gradients of x, weight, bias and norm. Gradients of
missing parameters are empty, and so is that of x if it is not needed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.arguments import output_size, split_of
from t2t_kernels.backends import HALF_DTYPES, Kernel, Operation, register
from t2t_kernels.library import declare, no_second_derivative


def like_map(x: Tensor) -> Tensor:
    """An uninitialised gradient of a map: channels-last if the map is, else contiguous."""
    layout = torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    kernel_size: int
    stride: int
    padding: int
    eps: float


class BackwardArguments(NamedTuple):
    grad: Tensor
    x: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    kernel_size: int
    stride: int
    padding: int
    eps: float
    need_x: bool


def _fake(call: Arguments) -> Tensor:
    h, w = output_size(call.x.shape[2], call.x.shape[3], *split_of(call))
    return call.x.new_empty((call.x.shape[0], h * w, call.weight.shape[0]))


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, ...]:
    x, weight = call.x, call.weight
    norm_shape = (0,) if call.norm_weight is None else call.norm_weight.shape
    return (
        like_map(x) if call.need_x else x.new_empty(0),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:1]),
        weight.new_empty(norm_shape),
        weight.new_empty(norm_shape),
    )


def _setup_context(ctx, call: Arguments, output: Tensor) -> None:
    ctx.numbers = *split_of(call), call.eps
    ctx.has_bias, ctx.has_norm = call.bias is not None, call.norm_weight is not None
    ctx.save_for_backward(call.x, call.weight, call.norm_weight, call.norm_bias)


def _backward(ops, ctx, grad: Tensor) -> dict[str, Tensor]:
    need_x = ctx.needs_input_grad[0]
    grads = ops.soft_split_linear_backward(grad, *ctx.saved_tensors, *ctx.numbers, need_x)
    found = dict(zip(("x", "weight", "bias", "norm_weight", "norm_bias"), grads, strict=True))
    if not need_x:
        del found["x"]
    if not ctx.has_bias:
        del found["bias"]
    if not ctx.has_norm:
        del found["norm_weight"], found["norm_bias"]
    return found


def _flops(call: Any) -> int:
    return flops.soft_split_linear(call.x, call.weight, split_of(call))


def _backward_flops(call: Any) -> int:
    return flops.soft_split_linear_backward(call.x, call.weight, split_of(call), call.need_x)


def why_not_projected(sizes: Mapping[str, int]) -> str | None:
    """The supported sizes that a call exceeds in csrc/cuda's projection of patches; None if it fits.

    The T2T layers have the same limits.
    """
    channels, kernel_size = sizes.get("channels", 64), sizes.get("kernel_size", 1)
    # Maps are read tap by tap, images row by row: at most 28 rows of at most 8 pixels.
    if channels % 64 != 0 and (kernel_size > 8 or channels * kernel_size > 28):
        return (
            "maps with a multiple of 64 channels, and images with kernel_size up to 8 and "
            f"channels × kernel_size up to 28, got {channels} channels and kernel_size {kernel_size}"
        )
    if sizes.get("stride", 1) > 8:
        return f"strides up to 8, got {sizes['stride']}"
    if sizes.get("outputs", 0) % 8 != 0:
        return f"a multiple of 8 outputs, got {sizes['outputs']}"
    return None


def why_not_a_grid(sizes: Mapping[str, int]) -> str | None:
    """The supported sizes that a call exceeds in Triton's backward of a projection; None if it fits.

    The second dimension of a CUDA grid, at most 65,535 programs, counts the classes of pixels in one
    kernel, and blocks of a patch's elements in another. The T2T layers have the same limits.
    """
    if sizes.get("stride", 1) > 255:
        return f"strides up to 255, got {sizes['stride']}"
    blocks = sizes.get("kernel_size", 1) ** 2 * -(-sizes.get("channels", 1) // 32)
    if blocks > 65535:
        return f"kernel_size² × ⌈channels / 32⌉ up to 65535, got {blocks}"
    return None


SOFT_SPLIT_LINEAR = register(
    Operation(
        "soft_split_linear",
        kernels={
            "cpu": Kernel(),
            "triton": Kernel(why_not_map=why_not_a_grid),
            "cuda": Kernel(HALF_DTYPES, why_not_map=why_not_projected),
        },
        parts=("soft_split",),
        cuda_first=HALF_DTYPES,
    )
)

declare(
    "soft_split_linear",
    Arguments,
    "Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "soft_split_linear_backward",
    BackwardArguments,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
