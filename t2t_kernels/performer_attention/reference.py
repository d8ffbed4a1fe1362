"""Performer attention in plain PyTorch, finite for all finite q and k.

Positive random features (Performers, lemma 1): φ(x) = exp(w·x − |x|²/2) / √m, and
y_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / (φ(q_t)·Σ_s φ(k_s) + eps). The exponentials are kept in range by two
maxima that cancel: one over the tokens for each feature of k, one over the features and eps for
each q. The normaliser is then at least 1.
"""

import math

import torch
from torch import Tensor

# |x|² of larger elements would overflow float32.
_LARGEST = 1e15


def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, *, eps: float) -> Tensor:
    dtype = v.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    k, q, v, w = (tensor.to(accumulate) for tensor in (k, q, v, w.detach()))
    k, q = k.clamp(-_LARGEST, _LARGEST), q.clamp(-_LARGEST, _LARGEST)

    log_k = k @ w.t() - _half_square(k)
    # |q|²/2 is common to all features of a token. It enters only the eps term, so that its rounding does
    # not affect anything else.
    log_q, half_q = q @ w.t(), _half_square(q)
    # The result does not depend on the maxima, so they are constants for the gradient.
    maximum_k = log_k.detach().amax(1, keepdim=True)
    maximum_q = (log_q.detach() + maximum_k).amax(2, keepdim=True)
    if eps > 0:
        # Relative to these features, the eps term is eps·m·exp(|q|²/2): one more exponent.
        log_eps = half_q + (math.log(eps) + math.log(w.shape[0]))
        maximum_q = maximum_q.maximum(log_eps.detach())

    features_k = (log_k - maximum_k).exp()
    features_q = (log_q + maximum_k - maximum_q).exp()
    normalizer = features_q @ features_k.sum(1).unsqueeze(2)
    if eps > 0:
        normalizer = normalizer + (log_eps - maximum_q).exp()
    y = features_q @ (features_k.transpose(1, 2) @ v) / normalizer
    return y.to(dtype)


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2
