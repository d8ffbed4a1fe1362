"""Function transforms, under which a compiled kernel would be wrong or fail."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active_transform(tensors: Iterable[Tensor | None]) -> str | None:
    """The transform that needs plain PyTorch operators for ``tensors``; None if there is none.

    The compiled operators have a gradient, but no tangent: forward-mode AD through them would give
    zeros without an error. The transforms of ``torch.func`` do not see through them.
    """
    # While a graph is captured, its own operators are transformed; only the tangents matter there.
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "the transforms of torch.func"
    if forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    ):
        return "forward-mode AD"
    return None
