"""Softmax attention over the tokens of a map in plain PyTorch."""

import torch
from torch import Tensor


def token_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    # Scores and their statistics are float32, as in PyTorch's own attention.
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(accumulate) * scale) @ k.to(accumulate).transpose(1, 2)
    return scores.softmax(-1).to(v.dtype) @ v
