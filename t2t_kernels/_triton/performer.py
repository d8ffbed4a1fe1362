"""Performer attention on tiles of tokens, finite for every finite input.

The reference's algebra: with log-features a = w·k − |k|²/2 and b = w·q, the maxima c_i = max_s a_si and
g_t = max_i (b_ti + c_i) leave the exponentials; |q|²/2 is common to a token's features and stays in
the eps term alone. The sums over keys are Z_i = Σ_s e^(a_si − c_i) and S_i = Σ_s e^(a_si − c_i) v_s.
"""

import math

import triton
import triton.language as tl

from t2t_kernels._triton import dot, rounded

# Tokens whose sums one program takes: the partial sums of a chunk are a few kilobytes.
CHUNK = 512

_LARGEST = tl.constexpr(1e15)


def log_eps_term(eps: float, features: int) -> float:
    """log(eps·m) as `attend` takes it; anything without eps."""
    return math.log(eps) + math.log(features) if eps > 0 else 0.0


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
def load_features(p_w, FEATURES: tl.constexpr, FEATURES_P: tl.constexpr, EMBED: tl.constexpr,
                  EMBED_P: tl.constexpr):  # fmt: skip
    o_m = tl.arange(0, FEATURES_P)
    return load_rows(p_w, o_m, o_m < FEATURES, EMBED, 1, EMBED, EMBED_P)


@triton.jit
def _within_range(b):
    return tl.minimum(tl.maximum(b, -_LARGEST), _LARGEST)


@triton.jit
def _products(b_z, b_w, BLOCK_T: tl.constexpr, FEATURES_P: tl.constexpr):
    return dot(b_z, tl.trans(b_w), tl.zeros([BLOCK_T, FEATURES_P], tl.float32))


@triton.jit
def _times_column(b, column, ROWS: tl.constexpr):
    """b·column by the matrix unit: Z is rounded as S is, so that what cancels in S / Z does."""
    b_column = tl.where((tl.arange(0, 16) == 0)[None, :], column[:, None], 0.0)
    return tl.sum(dot(b, b_column, tl.zeros([ROWS, 16], tl.float32)), 1)


@triton.jit
def add_keys(b_k, b_v, m_t, b_w, maximum, normalizer, sums, BLOCK_T: tl.constexpr,
             FEATURES_P: tl.constexpr):  # fmt: skip
    """Add a tile of keys and values to the sums under a running maximum."""
    b_k = _within_range(b_k)
    b_log = _products(b_k, b_w, BLOCK_T, FEATURES_P) - tl.sum(b_k * b_k, 1)[:, None] * 0.5
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
def load_sums(p_maximum, p_normalizer, p_sums, FEATURES: tl.constexpr, FEATURES_P: tl.constexpr,
              EMBED: tl.constexpr, EMBED_P: tl.constexpr):  # fmt: skip
    o_m = tl.arange(0, FEATURES_P)
    m_m = o_m < FEATURES
    maximum = tl.load(p_maximum + o_m, mask=m_m, other=0.0)
    normalizer = tl.load(p_normalizer + o_m, mask=m_m, other=0.0)
    return maximum, normalizer, load_rows(p_sums, o_m, m_m, EMBED, 1, EMBED, EMBED_P)


@triton.jit
def merge_sums(p_maximum, p_normalizer, p_sums, chunks, FEATURES: tl.constexpr,
               FEATURES_P: tl.constexpr, EMBED: tl.constexpr, EMBED_P: tl.constexpr):  # fmt: skip
    """The sums of an image from those of its chunks, one after the other."""
    maximum, normalizer, sums = load_sums(p_maximum, p_normalizer, p_sums, FEATURES, FEATURES_P,
                                          EMBED, EMBED_P)  # fmt: skip
    for i in range(1, chunks):
        other, other_normalizer, other_sums = load_sums(
            p_maximum + i * FEATURES, p_normalizer + i * FEATURES, p_sums + i * FEATURES * EMBED,
            FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
        larger = tl.maximum(maximum, other)
        shrink = tl.exp(maximum - larger)
        shrink_other = tl.exp(other - larger)
        normalizer = normalizer * shrink + other_normalizer * shrink_other
        sums = sums * shrink[:, None] + other_sums * shrink_other[:, None]
        maximum = larger
    return maximum, normalizer, sums


@triton.jit
def attend(b_q, b_w, maximum, normalizer, sums, log_eps, BLOCK_T: tl.constexpr, FEATURES: tl.constexpr,
           FEATURES_P: tl.constexpr, EMBED_P: tl.constexpr, HAS_EPS: tl.constexpr):  # fmt: skip
    """y = N / D of a tile of queries; also their features f, D, and the derivative of D by |q|²/2."""
    b_q = _within_range(b_q)
    half = tl.sum(b_q * b_q, 1) * 0.5
    m_m = tl.arange(0, FEATURES_P) < FEATURES
    b_log = _products(b_q, b_w, BLOCK_T, FEATURES_P) + maximum[None, :]
    b_log = tl.where(m_m[None, :], b_log, float("-inf"))
    top = tl.max(b_log, 1)
    if HAS_EPS:
        # The eps term, eps·m·exp(|q|²/2) beside these features, is one more exponent.
        top = tl.maximum(top, half + log_eps)
    b_f = tl.exp(b_log - top[:, None])
    divisor = _times_column(b_f, normalizer, BLOCK_T)
    slope = half * 0.0
    if HAS_EPS:
        slope = tl.exp(half + log_eps - top)
        divisor += slope
    b_n = dot(b_f, sums, tl.zeros([BLOCK_T, EMBED_P], tl.float32))
    return b_n / divisor[:, None], b_f, divisor, slope


@triton.jit
def attend_backward(b_dy, b_y, b_q, b_f, divisor, slope, b_w, normalizer, sums,
                    BLOCK_T: tl.constexpr, FEATURES_P: tl.constexpr, EMBED_P: tl.constexpr):  # fmt: skip
    """Gradient of the queries, and of N and D, of which the sums' gradients are made."""
    b_dn = b_dy / divisor[:, None]
    dd = -tl.sum(b_dn * b_y, 1)
    b_df = dot(b_dn, tl.trans(sums), tl.zeros([BLOCK_T, FEATURES_P], tl.float32))
    b_dlog = b_f * (b_df + dd[:, None] * normalizer[None, :])
    b_dq = dot(b_dlog, b_w, tl.zeros([BLOCK_T, EMBED_P], tl.float32))
    b_dq = tl.where(tl.abs(b_q) <= _LARGEST, b_dq + b_q * (dd * slope)[:, None], 0.0)
    return b_dq, b_dn, dd


@triton.jit
def keys_backward(b_k, b_v, m_t, b_w, maximum, d_normalizer, d_sums, BLOCK_T: tl.constexpr,
                  FEATURES_P: tl.constexpr, EMBED_P: tl.constexpr):  # fmt: skip
    """Gradients of a tile of keys and values from those of the sums."""
    b_inside = _within_range(b_k)
    half = tl.sum(b_inside * b_inside, 1) * 0.5
    b_log = _products(b_inside, b_w, BLOCK_T, FEATURES_P) - half[:, None]
    b_phi = tl.exp(tl.where(m_t[:, None], b_log - maximum[None, :], float("-inf")))
    b_dphi = dot(b_v, tl.trans(d_sums), tl.zeros([BLOCK_T, FEATURES_P], tl.float32))
    b_dlog = b_phi * (b_dphi + d_normalizer[None, :])
    b_dk = dot(b_dlog, b_w, tl.zeros([BLOCK_T, EMBED_P], tl.float32))
    b_dk = tl.where(tl.abs(b_k) <= _LARGEST, b_dk - b_k * tl.sum(b_dlog, 1)[:, None], 0.0)
    return b_dk, dot(b_phi, d_sums, tl.zeros([BLOCK_T, EMBED_P], tl.float32))


@triton.jit
def load_gradient_of_sums(p_d_normalizer, p_d_sums, chunks, FEATURES: tl.constexpr,
                          FEATURES_P: tl.constexpr, EMBED: tl.constexpr,
                          EMBED_P: tl.constexpr):  # fmt: skip
    """The sums' gradients of an image from those of its chunks, one after the other."""
    o_m = tl.arange(0, FEATURES_P)
    m_m = o_m < FEATURES
    d_normalizer = tl.zeros([FEATURES_P], tl.float32)
    d_sums = tl.zeros([FEATURES_P, EMBED_P], tl.float32)
    for i in range(0, chunks):
        d_normalizer += tl.load(p_d_normalizer + i * FEATURES + o_m, mask=m_m, other=0.0)
        d_sums += load_rows(p_d_sums + i * FEATURES * EMBED, o_m, m_m, EMBED, 1, EMBED, EMBED_P)
    return d_normalizer, d_sums
