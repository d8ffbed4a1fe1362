"""Softmax attention over a map's tokens in plain PyTorch."""

import torch
from torch import Tensor


def token_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(1, 2)
    # Statistics in float32, as PyTorch's own attention keeps them.
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=accumulate).to(v.dtype) @ v
