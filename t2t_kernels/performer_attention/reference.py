"""Performer attention in plain PyTorch, finite for every finite input.

Positive random features (Performers, lemma 1): φ(x) = exp(w·x − |x|²/2) / √m, and
y_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / (φ(q_t)·Σ_s φ(k_s) + eps). The exponentials are kept in range by two
maxima that cancel: c_i over the tokens for each feature of k, g_t over the features for each q.
"""

import torch
from torch import Tensor

# Beyond it |x|² overflows float32; the features there differ by less than float32 resolves anyway.
_LARGEST = 1e15
# e^-g with g at its floor still fits the dtype after the product with eps·m, and the attention
# there is below its smallest normal number.
_LOG_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}


def log_features(x: Tensor, w: Tensor) -> Tensor:
    """log(√m φ(x)): x (B, T, E), w (m, E) → (B, T, m)."""
    x = x.clamp(-_LARGEST, _LARGEST)
    return x @ w.t() - x.square().sum(-1, keepdim=True) / 2


def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, *, eps: float) -> Tensor:
    dtype = v.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    k, q, v, w = (tensor.to(accumulate) for tensor in (k, q, v, w.detach()))

    log_k = log_features(k, w)
    log_q = log_features(q, w)
    # The result does not depend on the maxima: they are constants to the gradient.
    maximum_k = log_k.detach().amax(1, keepdim=True)
    maximum_q = (log_q.detach() + maximum_k).amax(2, keepdim=True)
    if eps > 0:
        maximum_q = maximum_q.clamp(min=_LOG_FLOOR[accumulate])

    features_k = (log_k - maximum_k).exp()
    features_q = (log_q + maximum_k - maximum_q).exp()
    normalizer = features_q @ features_k.sum(1).unsqueeze(2)
    if eps > 0:
        normalizer = normalizer + eps * w.shape[0] * (-maximum_q).exp()
    y = features_q @ (features_k.transpose(1, 2) @ v) / normalizer
    return y.to(dtype)
