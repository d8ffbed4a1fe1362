"""Soft split, LayerNorm and Linear in plain PyTorch: the specification of fused implementations."""

import torch.nn.functional as F
from torch import Tensor

from t2t_kernels.soft_split.api import soft_split


def soft_split_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
    backend: str | None,
) -> Tensor:
    """``backend`` is used for the soft split; with "reference" everything is plain PyTorch."""
    tokens = soft_split(x, kernel_size, stride, padding, backend=backend)
    if norm_weight is not None:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
    return F.linear(tokens, weight, bias)
