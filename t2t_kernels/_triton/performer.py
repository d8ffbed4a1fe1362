"""Performer attention on tiles of tokens, finite for every finite input.

The reference's algebra: with log-features a = w·k − |k|²/2 and b = w·q, the maxima c_i = max_s a_si and
g_t = max_i (b_ti + c_i) leave the exponentials; |q|²/2 is common to a token's features and stays in
the eps term alone. The sums over keys are Z_i = Σ_s e^(a_si − c_i) and S_i = Σ_s e^(a_si − c_i) v_s.
"""

import math
from collections.abc import Iterator

import triton
import triton.language as tl

from t2t_kernels._triton import dot, padded, rounded
from t2t_kernels._triton.matrix import add_product, times_matrix, times_transposed
from t2t_kernels._triton.split import add_to_slot

# Tokens whose sums one program takes: the partial sums of a chunk are a few kilobytes.
CHUNK = 512

# Random features whose sums one program keeps in registers.
_FEATURES_BLOCK = 64

_LARGEST = tl.constexpr(1e15)


def log_eps_term(eps: float, features: int) -> float:
    """log(eps·m) as `attend` takes it; anything without eps."""
    return math.log(eps) + math.log(features) if eps > 0 else 0.0


def blocks_of_features(constants: dict) -> Iterator[tuple[dict, int]]:
    """For each launch of a keys kernel, its constants of the random features, and the first of them.

    One launch for all 128 would need 144 KiB of shared memory and spill kilobytes.
    """
    features = constants["FEATURES"]
    for first in range(0, features, _FEATURES_BLOCK):
        count = min(_FEATURES_BLOCK, features - first)
        yield {"FEATURES_ALL": features, "FEATURES": count, "FEATURES_P": padded(count)}, first


@triton.jit
def load_rows(p, o_t, m_t, stride_t, stride_e, EMBED: tl.constexpr, EMBED_P: tl.constexpr):
    """Rows ``o_t`` of a (T, E) matrix in float32, zero beyond it."""
    o_e = tl.arange(0, EMBED_P)
    p = p + o_t[:, None] * stride_t + o_e[None, :] * stride_e
    return tl.load(p, mask=m_t[:, None] & (o_e < EMBED)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, b, o_t, m_t, EMBED: tl.constexpr, EMBED_P: tl.constexpr):
    """Rows ``o_t`` of a contiguous (T, E) matrix."""
    o_e = tl.arange(0, EMBED_P)
    p = p + o_t[:, None] * EMBED + o_e[None, :]
    tl.store(p, rounded(b, p.dtype.element_ty), mask=m_t[:, None] & (o_e < EMBED)[None, :])


@triton.jit
def _within_range(b):
    b = tl.maximum(b, -_LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(b, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _times_column(b, column, ROWS: tl.constexpr):
    """b·column by the matrix unit: Z is rounded as S is, so that what cancels in S / Z does."""
    b_column = tl.where((tl.arange(0, 16) == 0)[None, :], column[:, None], 0.0)
    return tl.sum(dot(b, b_column, tl.zeros([ROWS, 16], tl.float32)), 1)


@triton.jit
def add_keys(b_k, b_v, m_t, p_w, maximum, normalizer, sums, BLOCK_T: tl.constexpr,
             FEATURES: tl.constexpr, FEATURES_P: tl.constexpr, EMBED: tl.constexpr,
             EMBED_P: tl.constexpr):  # fmt: skip
    """Add a tile of keys and values to the sums under a running maximum."""
    b_k = _within_range(b_k)
    b_log = tl.zeros([BLOCK_T, FEATURES_P], tl.float32)
    b_log = times_transposed(b_k, p_w, b_log, FEATURES, EMBED)
    b_log -= tl.sum(b_k * b_k, 1)[:, None] * 0.5
    b_log = tl.where(m_t[:, None], b_log, float("-inf"))
    larger = tl.maximum(maximum, tl.max(b_log, 0))
    shrink = tl.exp(maximum - larger)
    b_phi = tl.exp(b_log - larger[None, :])
    normalizer = normalizer * shrink + _times_column(tl.trans(b_phi), m_t.to(tl.float32), FEATURES_P)
    sums = dot(tl.trans(b_phi), b_v, sums * shrink[:, None])
    return larger, normalizer, sums


@triton.jit
def store_sums(p_maximum, p_normalizer, p_sums, maximum, normalizer, sums, FEATURES: tl.constexpr,
               FEATURES_P: tl.constexpr, EMBED: tl.constexpr, EMBED_P: tl.constexpr):  # fmt: skip
    o_m = tl.arange(0, FEATURES_P)
    m_m = o_m < FEATURES
    tl.store(p_maximum + o_m, maximum, mask=m_m)
    tl.store(p_normalizer + o_m, normalizer, mask=m_m)
    store_rows(p_sums, sums, o_m, m_m, EMBED, EMBED_P)


@triton.jit
def _load_features(p, FEATURES: tl.constexpr, FEATURES_P: tl.constexpr):
    """A number per feature, 0 beyond them."""
    o_m = tl.arange(0, FEATURES_P)
    return tl.load(p + o_m, mask=o_m < FEATURES, other=0.0)


@triton.jit
def merge_sums(p_part_maximum, p_part_normalizer, p_part_sums, p_maximum, p_normalizer, p_sums, chunks,
               FEATURES: tl.constexpr, FEATURES_P: tl.constexpr, EMBED: tl.constexpr,
               EMBED_P: tl.constexpr):  # fmt: skip
    """The sums of an image from those of its chunks, one after the other.

    Each of the image's programs does so and writes the same numbers, so that it can read its own.
    """
    o_m = tl.arange(0, FEATURES_P)
    m_m = o_m < FEATURES
    maximum = tl.full([FEATURES_P], float("-inf"), tl.float32)
    normalizer = tl.zeros([FEATURES_P], tl.float32)
    sums = tl.zeros([FEATURES_P, EMBED_P], tl.float32)
    for i in range(0, chunks):
        other = tl.load(p_part_maximum + i * FEATURES + o_m, mask=m_m, other=0.0)
        larger = tl.maximum(maximum, other)
        shrink = tl.exp(maximum - larger)
        grow = tl.exp(other - larger)
        other = tl.load(p_part_normalizer + i * FEATURES + o_m, mask=m_m, other=0.0)
        normalizer = normalizer * shrink + other * grow
        b_other = load_rows(p_part_sums + i * FEATURES * EMBED, o_m, m_m, EMBED, 1, EMBED, EMBED_P)
        sums = sums * shrink[:, None] + b_other * grow[:, None]
        maximum = larger
    store_sums(p_maximum, p_normalizer, p_sums, maximum, normalizer, sums, FEATURES, FEATURES_P, EMBED,
               EMBED_P)  # fmt: skip
    tl.debug_barrier()


@triton.jit
def attend(b_q, p_w, p_maximum, p_normalizer, p_sums, log_eps, BLOCK_T: tl.constexpr,
           FEATURES: tl.constexpr, FEATURES_P: tl.constexpr, EMBED: tl.constexpr,
           EMBED_P: tl.constexpr, HAS_EPS: tl.constexpr):  # fmt: skip
    """y = N / D of a tile of queries; also their features f, D, and the derivative of D by |q|²/2."""
    b_q = _within_range(b_q)
    half = tl.sum(b_q * b_q, 1) * 0.5
    b_log = tl.zeros([BLOCK_T, FEATURES_P], tl.float32)
    b_log = times_transposed(b_q, p_w, b_log, FEATURES, EMBED)
    b_log += _load_features(p_maximum, FEATURES, FEATURES_P)[None, :]
    b_log = tl.where((tl.arange(0, FEATURES_P) < FEATURES)[None, :], b_log, float("-inf"))
    top = tl.max(b_log, 1)
    if HAS_EPS:
        # The eps term, eps·m·exp(|q|²/2) beside these features, is one more exponent.
        top = tl.maximum(top, half + log_eps)
    b_f = tl.exp(b_log - top[:, None])
    divisor = _times_column(b_f, _load_features(p_normalizer, FEATURES, FEATURES_P), BLOCK_T)
    slope = half * 0.0
    if HAS_EPS:
        slope = tl.exp(half + log_eps - top)
        divisor += slope
    b_n = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_n = times_matrix(b_f, p_sums, b_n, FEATURES, EMBED)
    return b_n / divisor[:, None], b_f, divisor, slope


@triton.jit
def attend_backward(b_dy, b_y, b_q, b_f, divisor, slope, p_w, p_normalizer, p_sums,
                    BLOCK_T: tl.constexpr, FEATURES: tl.constexpr, FEATURES_P: tl.constexpr,
                    EMBED: tl.constexpr, EMBED_P: tl.constexpr):  # fmt: skip
    """Gradient of a tile of queries."""
    b_dn = b_dy / divisor[:, None]
    dd = -tl.sum(b_dn * b_y, 1)
    b_df = tl.zeros([BLOCK_T, FEATURES_P], tl.float32)
    b_df = times_transposed(b_dn, p_sums, b_df, FEATURES, EMBED)
    b_df += dd[:, None] * _load_features(p_normalizer, FEATURES, FEATURES_P)[None, :]
    b_dq = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_dq = times_matrix(b_f * b_df, p_w, b_dq, FEATURES, EMBED)
    return tl.where(tl.abs(b_q) <= _LARGEST, b_dq + b_q * (dd * slope)[:, None], 0.0)


@triton.jit
def keys_backward(b_k, b_v, m_t, p_w, p_maximum, p_d_sums, BLOCK_T: tl.constexpr,
                  FEATURES: tl.constexpr, FEATURES_P: tl.constexpr, EMBED: tl.constexpr,
                  EMBED_P: tl.constexpr):  # fmt: skip
    """Gradients of a tile of keys and values from those of the sums."""
    b_inside = _within_range(b_k)
    b_log = tl.zeros([BLOCK_T, FEATURES_P], tl.float32)
    b_log = times_transposed(b_inside, p_w, b_log, FEATURES, EMBED)
    b_log -= (tl.sum(b_inside * b_inside, 1) * 0.5)[:, None]
    b_log -= _load_features(p_maximum, FEATURES, FEATURES_P)[None, :]
    b_phi = tl.exp(tl.where(m_t[:, None], b_log, float("-inf")))
    b_dphi = tl.zeros([BLOCK_T, FEATURES_P], tl.float32)
    b_dphi = times_transposed(b_v, p_d_sums, b_dphi, FEATURES_P, EMBED_P)
    b_dphi += tl.load(p_d_sums + FEATURES_P * EMBED_P + tl.arange(0, FEATURES_P))[None, :]
    b_dv = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_dv = times_matrix(b_phi, p_d_sums, b_dv, FEATURES_P, EMBED_P)
    b_dlog = b_phi * b_dphi
    b_dk = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_dk = times_matrix(b_dlog, p_w, b_dk, FEATURES, EMBED)
    return tl.where(tl.abs(b_k) <= _LARGEST, b_dk - b_k * tl.sum(b_dlog, 1)[:, None], 0.0), b_dv


def gradient_of_sums_size(features_p: int, embed_p: int) -> int:
    """Floats of the gradients of S, then of Z."""
    return features_p * (embed_p + 1)


@triton.jit
def add_gradient_of_sums(p_d_sums, b_dy, b_y, b_f, divisor, started, FEATURES_P: tl.constexpr,
                         EMBED_P: tl.constexpr):  # fmt: skip
    """Add a tile of queries' part to the gradients of S and Z."""
    b_dn = b_dy / divisor[:, None]
    dd = tl.sum(b_dn * b_y, 1)
    p_d_normalizer = p_d_sums + FEATURES_P * EMBED_P + tl.arange(0, FEATURES_P)
    add_to_slot(p_d_normalizer, -tl.sum(b_f * dd[:, None], 0), started)
    add_product(p_d_sums, b_f, b_dn, started)


@triton.jit
def sum_gradients_of_sums(p_parts, p_d_sums, chunks, FEATURES_P: tl.constexpr, EMBED_P: tl.constexpr):
    """The gradients of an image's S and Z from those of its chunks, one after the other.

    Each of the image's programs does so and writes the same numbers, so that it can read its own.
    """
    SIZE: tl.constexpr = FEATURES_P * EMBED_P
    o = tl.arange(0, SIZE)
    o_m = SIZE + tl.arange(0, FEATURES_P)
    b = tl.zeros([SIZE], tl.float32)
    b_m = tl.zeros([FEATURES_P], tl.float32)
    for i in range(0, chunks):
        p = p_parts + i * (SIZE + FEATURES_P)
        b += tl.load(p + o)
        b_m += tl.load(p + o_m)
    tl.store(p_d_sums + o, b)
    tl.store(p_d_sums + o_m, b_m)
    tl.debug_barrier()
