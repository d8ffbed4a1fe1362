"""Checks and conversions of the public functions' arguments. Errors name argument, got, expected."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

# In the kernels, products of two larger sizes would overflow.
_LARGEST_SIZE = 2**15

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def constant_in_graphs(function: Any) -> Any:
    """Let a graph of torch.compile take the result of ``function`` as a constant.

    As ``torch.compiler.assume_constant_result``, which would import torch._dynamo and Triton here.
    """
    function._dynamo_marked_constant = True
    return function


def output_size(
    height: int, width: int, kernel_size: int, stride: int, padding: int
) -> tuple[int, int]:
    """The grid of tokens ``(h, w)`` of a soft split of a ``height`` × ``width`` map.

    Raises:
        TypeError, ValueError: A size is not an integer or is out of range, or the padded map is
            smaller than the kernel.
    """
    for name, value, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: got {value!r}, expected an integer")
        if not least <= value < _LARGEST_SIZE:
            raise ValueError(f"{name}: got {value}, expected from {least} to {_LARGEST_SIZE - 1}")
    h = (height + 2 * padding - kernel_size) // stride + 1
    w = (width + 2 * padding - kernel_size) // stride + 1
    if h < 1 or w < 1:
        raise ValueError(
            f"x: got a map of {height}×{width}; a soft split with kernel_size {kernel_size} and "
            f"padding {padding} needs at least {max(1, kernel_size - 2 * padding)} in each direction"
        )
    return h, w


def split_of(call) -> tuple[int, int, int]:
    """The geometry of a soft split, from an operator's arguments."""
    return call.kernel_size, call.stride, call.padding


def check_split(x: Tensor, kernel_size: int, stride: int, padding: int) -> None:
    """Check a map (B, C, H, W) and the geometry of its soft split."""
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected 4 dimensions (B, C, H, W)")
    if min(x.shape[1:]) < 1:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected at least one channel and one pixel"
        )
    output_size(x.shape[2], x.shape[3], kernel_size, stride, padding)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is a strided tensor with a supported floating-point dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, expected a strided (dense) tensor")


def check_parameter(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, *, like_name: str = "x"
) -> None:
    """Check the shape of a parameter, and that its dtype and device are those of ``like``."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {like.device} as {like_name} has"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected {like.dtype} as {like_name} has; convert one of "
            f"them, or call under torch.autocast({like.device.type!r})"
        )


def check_eps(eps: float) -> None:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps: got {eps!r}, expected a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, expected a finite number that is not negative")


# torch.compile of torch 2.11 does not trace this call.
@constant_in_graphs
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of an enclosing ``torch.autocast`` for the device of ``x``, if any."""
    if not isinstance(x, Tensor) or not _has_autocast(x.device.type):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def cast(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """``tensor`` converted as autocast does for a matrix product: float64 and non-tensors unchanged."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def check_params(params, expected: type) -> None:
    if not isinstance(params, expected):
        raise TypeError(f"params: got {type(params).__name__}, expected {expected.__name__}")


def check_shapes(params, x: Tensor, **shapes: tuple[int, ...]) -> None:
    for name, shape in shapes.items():
        check_parameter(f"params.{name}", getattr(params, name), shape, x)


def rows_of(params, name: str) -> int:
    weight = getattr(params, name)
    check_tensor(f"params.{name}", weight)
    if weight.dim() != 2:
        raise ValueError(f"params.{name}: got shape {tuple(weight.shape)}, expected a matrix")
    return weight.shape[0]
