"""Performer attention in plain PyTorch, finite for every finite input.

Positive random features (Performers, lemma 1): φ(x) = exp(w·x − |x|²/2) / √m, and
y_t = φ(q_t)·Σ_s φ(k_s) v_sᵀ / (φ(q_t)·Σ_s φ(k_s) + eps). The exponentials are kept in range by two
maxima that cancel: one over the tokens for each feature of k, one over the features for each q.
"""

import torch
from torch import Tensor

# Beyond it |x|² overflows float32; the features there differ by less than float32 resolves anyway.
_LARGEST = 1e15
# The largest exponent of e in the eps term: it still fits the dtype after the product with eps·m,
# and the attention there is below its smallest normal number.
_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


def performer_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, *, eps: float) -> Tensor:
    dtype = v.dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    k, q, v, w = (tensor.to(accumulate) for tensor in (k, q, v, w.detach()))
    k, q = k.clamp(-_LARGEST, _LARGEST), q.clamp(-_LARGEST, _LARGEST)

    log_k = k @ w.t() - _half_square(k)
    # |q|²/2 is common to a token's features: in the eps term alone it costs no precision elsewhere.
    log_q, half_q = q @ w.t(), _half_square(q)
    # The result does not depend on the maxima: they are constants to the gradient.
    maximum_k = log_k.detach().amax(1, keepdim=True)
    maximum_q = (log_q.detach() + maximum_k).amax(2, keepdim=True)
    if eps > 0:
        maximum_q = maximum_q.maximum(half_q.detach() - _LARGEST_EXPONENT[accumulate])

    features_k = (log_k - maximum_k).exp()
    features_q = (log_q + maximum_k - maximum_q).exp()
    normalizer = features_q @ features_k.sum(1).unsqueeze(2)
    if eps > 0:
        # Clamped again: beyond 2^24 the difference may round to more than was subtracted.
        exponent = (half_q - maximum_q).clamp(max=_LARGEST_EXPONENT[accumulate])
        normalizer = normalizer + eps * w.shape[0] * exponent.exp()
    y = features_q @ (features_k.transpose(1, 2) @ v) / normalizer
    return y.to(dtype)


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2
