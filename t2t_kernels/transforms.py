"""Function transforms that compiled kernels do not support."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active_transform(tensors: Iterable[Tensor | None]) -> str | None:
    """The transform that needs plain PyTorch operators for ``tensors``; None if there is none.

    The compiled operators only support reverse mode: forward-mode AD would give zeros without an
    error, and the transforms of ``torch.func`` cannot transform them.
    """
    # During graph capture, the operators of the graph are transformed; only tangents matter.
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "the transforms of torch.func"
    if forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    ):
        return "forward-mode AD"
    return None
