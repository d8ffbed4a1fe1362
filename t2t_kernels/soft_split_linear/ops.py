"""The contract of soft split + LayerNorm + Linear: schemas, fakes and the gradient.

Nothing is saved but the inputs. The backward returns the gradients of x, weight, bias and norm; those
that do not exist, and that of x where it is not asked for, are empty.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.arguments import output_size
from t2t_kernels.backends import HALF_DTYPES, register_operation
from t2t_kernels.library import declare, no_second_derivative


def like_map(x: Tensor) -> Tensor:
    """The gradient of a map: channels-last where the map is, else contiguous."""
    layout = torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fake(x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, eps) -> Tensor:
    h, w = output_size(x.shape[2], x.shape[3], kernel_size, stride, padding)
    return x.new_empty((x.shape[0], h * w, weight.shape[0]))


def _backward_fake(
    grad, x, weight, norm_weight, norm_bias, kernel_size, stride, padding, eps, need_x
) -> tuple[Tensor, ...]:
    norm_shape = (0,) if norm_weight is None else norm_weight.shape
    return (
        like_map(x) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[:1]),
        weight.new_empty(norm_shape),
        weight.new_empty(norm_shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, norm_weight, norm_bias, *ctx.rest = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, norm_weight, norm_bias)


def _backward(ops, ctx, grad: Tensor):
    x, weight, norm_weight, norm_bias = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_bias, *grad_norm = ops.soft_split_linear_backward(
        grad, x, weight, norm_weight, norm_bias, *ctx.rest, need_x
    )
    return (
        grad_x if need_x else None,
        grad_weight,
        grad_bias if ctx.has_bias else None,
        *(grad_norm if norm_weight is not None else (None, None)),
        *(None for _ in ctx.rest),
    )


def _flops(x, weight, bias, norm_weight, norm_bias, *rest) -> int:
    return flops.soft_split_linear(x, weight, rest[:3])


def _backward_flops(grad, x, weight, norm_weight, norm_bias, *rest) -> int:
    return flops.soft_split_linear_backward(x, weight, rest[:3], need_x=rest[-1])


def why_not_projected(sizes: Mapping[str, int]) -> str | None:
    """What csrc/cuda's projection of patches does not take, here and in the T2T layers."""
    channels, kernel_size = sizes.get("channels", 64), sizes.get("kernel_size", 1)
    # Maps go tap by tap, images row by row: at most 28 rows of at most 8 pixels.
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


SOFT_SPLIT_LINEAR = register_operation(
    "soft_split_linear",
    kernels=("cpu", "triton", "cuda"),
    parts=("soft_split",),
    dtypes={"cuda": HALF_DTYPES},
    why_not_map={"cuda": why_not_projected},
)

declare(
    "soft_split_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "int kernel_size, int stride, int padding, float eps) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "soft_split_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, "
    "int kernel_size, int stride, int padding, float eps, bool need_x) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
