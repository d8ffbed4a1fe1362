"""The tolerance of parity tests: twice the error of plain PyTorch in the same dtype."""

import torch
from torch import Tensor

# For results that plain PyTorch happens to get exactly: a few roundings of the largest element.
_ROUNDINGS = 4


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "result") -> None:
    """max|ours − exact| ≤ 2·max|plain − exact| + floor.

    Args:
        ours: the kernel's result.
        plain: plain PyTorch's result in the dtype of ``ours``.
        exact: the same from float64 inputs that hold the same numbers.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)} != {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype} != {plain.dtype}"
    if ours.numel() == 0:
        return
    assert torch.isfinite(ours).all(), (
        f"{what}: {(~torch.isfinite(ours)).sum()} elements not finite"
    )
    exact = exact.double().to(ours.device)
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (plain.double().to(ours.device) - exact).abs().max().item()
    allowed += _ROUNDINGS * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e} exceeds {allowed:.3e} ({ours.dtype})"
