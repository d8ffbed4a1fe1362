"""Soft split: an image or feature map as overlapping tokens (T2T-ViT, section 3.1)."""

from torch import Tensor

from t2t_kernels.arguments import check_split
from t2t_kernels.backends import choose
from t2t_kernels.library import operators
from t2t_kernels.soft_split import reference
from t2t_kernels.soft_split.ops import SOFT_SPLIT


def soft_split(
    x: Tensor, kernel_size: int, stride: int, padding: int, *, backend: str | None = None
) -> Tensor:
    """Cut a map into overlapping square patches, one token each.

    The same function as :func:`torch.nn.functional.unfold` followed by a transpose. Autocast leaves
    its dtype alone: it moves data and computes nothing.

    Args:
        x: (B, C, H, W), float32, float16, bfloat16 or float64, any memory format or strides.
        kernel_size: side k of a patch, in pixels, at least 1.
        stride: distance between patches, in pixels, at least 1.
        padding: rows and columns of zeros around the map, at least 0.
        backend: None chooses; see ``t2t_kernels.backends``.

    Returns:
        Tokens (B, T, C·k·k) in the dtype of ``x``. T = h·w, row by row over the grid that
        :func:`t2t_kernels.output_size` gives; a token's elements in the order (channel, row, column).

    Raises:
        TypeError: ``x`` is not a dense tensor of a floating dtype; a size is not an integer.
        ValueError: ``x`` has not four dimensions or is smaller than a patch; a size is too small.
        BackendUnavailable: the named backend cannot run this call.
    """
    check_split(x, kernel_size, stride, padding)
    chosen = choose(SOFT_SPLIT, x.device, x.dtype, backend, tensors=(x,))
    if chosen == "reference":
        return reference.soft_split(x, kernel_size, stride, padding)
    return operators(chosen).soft_split(x, kernel_size, stride, padding)
