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
    """Extract overlapping square patches of a map, one per token.

    The same as :func:`torch.nn.functional.unfold` followed by a transpose. Autocast does not change the
    dtype, because the data is only copied.

    Args:
        x: (B, C, H, W), float32, float16, bfloat16 or float64, any memory format or strides.
        kernel_size: Side k of a patch in pixels, at least 1.
        stride: Distance between patches in pixels, at least 1.
        padding: Rows and columns of zeros around the map, at least 0.
        backend: A backend, or None for the first available one; see ``docs/backends.md``.

    Returns:
        Tokens (B, T, C·k·k) in the dtype of ``x``. The T = h·w tokens are ordered row by row on the grid
        of :func:`t2t_kernels.output_size`, and the elements of a token by (channel, row, column).

    Raises:
        TypeError: ``x`` is not a dense floating-point tensor, or a size is not an integer.
        ValueError: ``x`` does not have four dimensions or is smaller than a patch, or a size is too small.
        BackendUnavailable: The named backend cannot run this call.
    """
    check_split(x, kernel_size, stride, padding)
    chosen = choose(SOFT_SPLIT, x.device, x.dtype, backend, tensors=(x,))
    if chosen == "reference":
        return reference.soft_split(x, kernel_size, stride, padding)
    return operators(chosen).soft_split(x, kernel_size, stride, padding)
