"""Softmax attention over a map's tokens in plain PyTorch."""

import torch
from torch import Tensor


def token_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    # Scores and their statistics in float32, as PyTorch's own attention keeps them.
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(accumulate) * scale) @ k.to(accumulate).transpose(1, 2)
    return scores.softmax(-1).to(v.dtype) @ v
