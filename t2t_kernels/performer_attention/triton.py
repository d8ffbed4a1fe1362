"""Performer attention in Triton: two passes over the tokens in each direction, finite for every finite input.

With log-features a = w·k − |k|²/2 and b = w·q, c_i = max_s a_si and φ_si = e^(a_si − c_i), the sums over keys
are Z_i = Σ_s φ_si and S_i = Σ_s φ_si v_s. Queries use the means S̄ = S/Z:

    y_t = Σ_i f_ti S̄_i / D_t,   f_ti = Z_i e^(b_ti + c_i − g_t),   D_t = Σ_i f_ti + e^(h_t − g_t),

h_t being the exponent of the eps term, |q|²/2 + log(eps·m), and g_t the largest exponent of the query.
Features are rounded to the input's dtype once, for numerator and denominator alike.

Forward: the sums of a chunk of keys, their combination, the queries. Backward: the queries, with the
gradients of S̄ and Z of a chunk, their combination, the keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    IMPL_DEVICES,
    Launch,
    Sizes,
    check_offsets,
    device_guard,
    dot,
    launch,
    load_rows,
    rounded,
    store_rows,
    strides,
    table,
)
from t2t_kernels._triton.matrix import (
    in_parts,
    part_count,
    store_parts,
    times_matrix,
    times_transposed,
)

# Tokens whose sums one program takes, about: the sums of a chunk are a few kilobytes.
_CHUNK = 512
# Random features whose sums one program keeps in registers, and that one combines.
_FEATURES, _COMBINED = 64, 16

_LARGEST = tl.constexpr(1e15)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _within_range(b):
    """b with |b| up to _LARGEST, and half the squares of its rows.

    Beyond it |x|² overflows float32; the features there differ by less than float32 resolves anyway.
    """
    half = _half_square(b)
    if b.dtype != tl.float16:
        if tl.max(half, 0) > _LARGEST * _LARGEST / 2:
            b_inside = tl.maximum(b.to(tl.float32), -_LARGEST, propagate_nan=tl.PropagateNan.ALL)
            b_inside = tl.minimum(b_inside, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
            b = rounded(b_inside, b.dtype)
            half = _half_square(b)
    return b, half


@triton.jit
def _half_square(b):
    b = b.to(tl.float32)
    return tl.sum(b * b, 1) * 0.5


@triton.jit
def _load_features(p, D: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """A number per feature, OTHER beyond them."""
    o_m = tl.arange(0, D.features_p)
    return tl.load(p + o_m, mask=o_m < D.features, other=OTHER)


@triton.jit
def _sum_features(b_phi, b_column, ROWS: tl.constexpr):
    """b_phi·column by the matrix unit: Z is rounded as S is, so that what is common to both cancels in S/Z."""
    b_column = tl.where((tl.arange(0, 16) == 0)[None, :], b_column[:, None], 0.0)
    return tl.sum(dot(b_phi, rounded(b_column, b_phi.dtype), tl.zeros([ROWS, 16], tl.float32)), 1)


@triton.jit
def performer_attention_keys_kernel(
    p_k,  # (B, T, E)
    p_v,  # (B, T, E)
    p_w,  # (PARTS, m, E)
    p_maximum,  # (B·chunks, M) float32; M is ALL, m what this launch takes of them
    p_normalizer,  # (B·chunks, M) float32
    p_sums,  # (B·chunks, M, E) float32
    tokens,
    chunk,
    D: tl.constexpr,
    ALL: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """c, Z and S of a chunk of an image's keys."""
    chunks = tl.cdiv(tokens, chunk)
    i_part = tl.program_id(0).to(tl.int64)
    i_image = i_part // chunks
    start = tl.program_id(0) % chunks * chunk
    maximum = tl.full([tl.constexpr(D.features_p)], float("-inf"), tl.float32)
    normalizer = tl.zeros([tl.constexpr(D.features_p)], tl.float32)
    sums = tl.zeros([tl.constexpr(D.features_p), tl.constexpr(D.embed_p)], tl.float32)
    for first in tl.range(start, tl.minimum(start + chunk, tokens), BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_k, half = _within_range(load_rows(p_k, i_image, o_t, m_t, K, D))
        b_v = load_rows(p_v, i_image, o_t, m_t, V, D)
        b_log = tl.zeros([BLOCK_T, tl.constexpr(D.features_p)], tl.float32)
        b_log = times_transposed(b_k, p_w, b_log, D.features, D.embed, PARTS, 0, ALL * D.embed)
        b_log -= half[:, None]
        b_log = tl.where(m_t[:, None], b_log, float("-inf"))
        larger = tl.maximum(maximum, tl.max(b_log, 0))
        shrink = tl.exp(maximum - larger)
        b_phi = tl.trans(rounded(tl.exp(b_log - larger[None, :]), b_v.dtype))
        normalizer = normalizer * shrink + _sum_features(b_phi, m_t.to(tl.float32), D.features_p)
        sums = dot(b_phi, b_v, sums * shrink[:, None])
        maximum = larger
    o_m = tl.arange(0, D.features_p)
    m_m = o_m < D.features
    tl.store(p_maximum + i_part * ALL + o_m, maximum, mask=m_m)
    tl.store(p_normalizer + i_part * ALL + o_m, normalizer, mask=m_m)
    R: tl.constexpr = D.contiguous
    store_rows(p_sums + i_part * (ALL * D.embed), sums, 0, o_m, m_m, R, D)


@triton.jit
def performer_attention_combine_kernel(
    p_part_maximum,  # (B, chunks, m) float32
    p_part_normalizer,  # (B, chunks, m) float32
    p_part_sums,  # (B, chunks, m, E) float32
    p_maximum,  # (B, m) float32, or None as the next two
    p_normalizer,  # (B, m) float32
    p_sums,  # (B, m, E) float32
    p_means,  # (B, PARTS, m, E): S̄
    chunks,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sums of an image's chunks, one after the other, for BLOCK_M features."""
    R: tl.constexpr = D.contiguous
    SIZE: tl.constexpr = D.features * D.embed
    i_image = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < D.features
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    normalizer = tl.zeros([BLOCK_M], tl.float32)
    b_sums = tl.zeros([BLOCK_M, tl.constexpr(D.embed_p)], tl.float32)
    for i in range(0, chunks):
        i_part = i_image * chunks + i
        other = tl.load(p_part_maximum + i_part * D.features + o_m, mask=m_m, other=0.0)
        larger = tl.maximum(maximum, other)
        shrink = tl.exp(maximum - larger)
        grow = tl.exp(other - larger)
        other = tl.load(p_part_normalizer + i_part * D.features + o_m, mask=m_m, other=1.0)
        normalizer = normalizer * shrink + other * grow
        b_other = load_rows(p_part_sums + i_part * SIZE, 0, o_m, m_m, R, D)
        b_sums = b_sums * shrink[:, None] + b_other * grow[:, None]
        maximum = larger
    if p_maximum is not None:
        tl.store(p_maximum + i_image * D.features + o_m, maximum, mask=m_m)
        tl.store(p_normalizer + i_image * D.features + o_m, normalizer, mask=m_m)
        store_rows(p_sums + i_image * SIZE, b_sums, 0, o_m, m_m, R, D)
    o_e = tl.arange(0, D.embed_p)
    m = m_m[:, None] & (o_e < D.embed)[None, :]
    p_means += i_image * (PARTS * SIZE)
    store_parts(
        p_means, b_sums / normalizer[:, None], o_m[:, None] * D.embed + o_e[None, :], m, SIZE, PARTS
    )


@triton.jit
def attend(
    b_q,
    p_w,
    p_maximum,
    p_normalizer,
    p_means,
    log_eps,
    D: tl.constexpr,
    HAS_EPS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y of a tile of queries; also their features f, D, and the derivative of D by |q|²/2."""
    BLOCK_T: tl.constexpr = b_q.shape[0]
    b_q, half = _within_range(b_q)
    b_log = tl.zeros([BLOCK_T, tl.constexpr(D.features_p)], tl.float32)
    b_log = times_transposed(b_q, p_w, b_log, D.features, D.embed, PARTS)
    b_log += _load_features(p_maximum, D)[None, :]
    b_log = tl.where((tl.arange(0, D.features_p) < D.features)[None, :], b_log, float("-inf"))
    # Z as a factor: an exponent would be rounded with log Z. g takes its power of two alone.
    normalizer = _load_features(p_normalizer, D, 1.0)
    power = ((normalizer.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    top = tl.max(b_log + (power * _LN_2)[None, :], 1)
    if HAS_EPS:
        top = tl.maximum(top, half + log_eps)
    b_f = rounded(tl.exp(b_log - top[:, None]) * normalizer[None, :], b_q.dtype)
    divisor = tl.sum(b_f.to(tl.float32), 1)
    slope = half * 0.0
    if HAS_EPS:
        slope = tl.exp(half + log_eps - top)
        divisor += slope
    b_n = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
    b_n = times_matrix(b_f, p_means, b_n, D.features, D.embed, PARTS)
    return b_n / divisor[:, None], b_f, divisor, slope


@triton.jit
def performer_attention_queries_kernel(
    p_q,  # (B, T, E)
    p_w,  # (PARTS, m, E)
    p_maximum,  # (B, m) float32
    p_normalizer,  # (B, m) float32
    p_means,  # (B, PARTS, m, E)
    p_y,  # (B, T, E)
    tokens,
    log_eps,
    D: tl.constexpr,
    Q: tl.constexpr,
    Y: tl.constexpr,
    HAS_EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    b_q = load_rows(p_q, i_image, o_t, o_t < tokens, Q, D)
    b_y, b_f, divisor, slope = attend(
        b_q,
        p_w,
        p_maximum + i_image * D.features,
        p_normalizer + i_image * D.features,
        p_means + i_image * (PARTS * D.features * D.embed),
        log_eps,
        D,
        HAS_EPS,
        PARTS,
    )
    store_rows(p_y, b_y, i_image, o_t, o_t < tokens, Y, D)


@triton.jit
def performer_attention_bwd_queries_kernel(
    p_dy,  # (B, T, E)
    p_q,  # (B, T, E)
    p_w,  # (PARTS, m, E)
    p_maximum,  # (B, m) float32
    p_normalizer,  # (B, m) float32
    p_means,  # (B, PARTS, m, E)
    p_dq,  # (B, T, E)
    p_parts,  # (B·chunks, m, E + 1) float32: gradients of S̄, then Σ_t f·dL/dD
    tokens,
    chunk,
    log_eps,
    D: tl.constexpr,
    DY: tl.constexpr,
    Q: tl.constexpr,
    DQ: tl.constexpr,
    HAS_EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dq, and a chunk's part in the gradients of the sums."""
    chunks = tl.cdiv(tokens, chunk)
    i_part = tl.program_id(0).to(tl.int64)
    i_image = i_part // chunks
    start = tl.program_id(0) % chunks * chunk
    p_maximum += i_image * D.features
    p_normalizer += i_image * D.features
    p_means += i_image * (PARTS * D.features * D.embed)
    b_dmeans = tl.zeros([tl.constexpr(D.features_p), tl.constexpr(D.embed_p)], tl.float32)
    b_e = tl.zeros([tl.constexpr(D.features_p)], tl.float32)
    for first in tl.range(start, tl.minimum(start + chunk, tokens), BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_q = load_rows(p_q, i_image, o_t, m_t, Q, D)
        b_dy = load_rows(p_dy, i_image, o_t, m_t, DY, D).to(tl.float32)
        b_y, b_f, divisor, slope = attend(
            b_q, p_w, p_maximum, p_normalizer, p_means, log_eps, D, HAS_EPS, PARTS
        )
        b_dn = rounded(b_dy / divisor[:, None], b_q.dtype)
        d_divisor = -tl.sum(b_dn.to(tl.float32) * b_y, 1)
        b_e += tl.sum(b_f.to(tl.float32) * d_divisor[:, None], 0)
        b_df = tl.zeros([BLOCK_T, tl.constexpr(D.features_p)], tl.float32) + d_divisor[:, None]
        b_df = times_transposed(b_dn, p_means, b_df, D.features, D.embed, PARTS)
        b_dlog = rounded(b_f.to(tl.float32) * b_df, b_q.dtype)
        b_q = b_q.to(tl.float32)
        b_dq = times_matrix(
            b_dlog, p_w, b_q * (d_divisor * slope)[:, None], D.features, D.embed, PARTS
        )
        b_dq = tl.where(tl.abs(b_q) <= _LARGEST, b_dq, 0.0)
        store_rows(p_dq, b_dq, i_image, o_t, m_t, DQ, D)
        b_dmeans = dot(tl.trans(b_f), b_dn, b_dmeans)
    o_m = tl.arange(0, D.features_p)
    R: tl.constexpr = D.contiguous
    p_parts += i_part * (D.features * (D.embed + 1))
    store_rows(p_parts, b_dmeans, 0, o_m, o_m < D.features, R, D)
    tl.store(p_parts + D.features * D.embed + o_m, b_e, mask=o_m < D.features)


@triton.jit
def performer_attention_bwd_combine_kernel(
    p_parts,  # (B, chunks, m, E + 1) float32
    p_normalizer,  # (B, m) float32
    p_d_sums,  # (B, PARTS, m, E): gradients of S
    p_d_normalizer,  # (B, m) float32: gradients of Z
    chunks,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gradients of S and Z, for BLOCK_M features of an image."""
    i_image = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < D.features
    R: tl.constexpr = D.contiguous
    SIZE: tl.constexpr = D.features * (D.embed + 1)
    b_sums = tl.zeros([BLOCK_M, tl.constexpr(D.embed_p)], tl.float32)
    b_e = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, chunks):
        p = p_parts + (i_image * chunks + i) * SIZE
        b_sums += load_rows(p, 0, o_m, m_m, R, D)
        b_e += tl.load(p + D.features * D.embed + o_m, mask=m_m, other=0.0)
    normalizer = tl.load(p_normalizer + i_image * D.features + o_m, mask=m_m, other=1.0)
    o_e = tl.arange(0, D.embed_p)
    m = m_m[:, None] & (o_e < D.embed)[None, :]
    p_d_sums += i_image * (PARTS * D.features * D.embed)
    store_parts(
        p_d_sums,
        b_sums / normalizer[:, None],
        o_m[:, None] * D.embed + o_e[None, :],
        m,
        D.features * D.embed,
        PARTS,
    )
    tl.store(p_d_normalizer + i_image * D.features + o_m, b_e / normalizer, mask=m_m)


@triton.jit
def performer_attention_bwd_keys_kernel(
    p_k,  # (B, T, E)
    p_v,  # (B, T, E)
    p_w,  # (PARTS, m, E)
    p_maximum,  # (B, m) float32
    p_d_sums,  # (B, PARTS, m, E)
    p_d_normalizer,  # (B, m) float32
    p_dk,  # (B, T, E)
    p_dv,  # (B, T, E)
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DK: tl.constexpr,
    ADD_V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dk and dv of a tile of keys; with ADD_V, dv is added to what is there."""
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    p_d_sums += i_image * (PARTS * D.features * D.embed)
    b_k = load_rows(p_k, i_image, o_t, m_t, K, D)
    b_v = load_rows(p_v, i_image, o_t, m_t, V, D)
    b_inside, half = _within_range(b_k)
    b_log = tl.zeros([BLOCK_T, tl.constexpr(D.features_p)], tl.float32)
    b_log = times_transposed(b_inside, p_w, b_log, D.features, D.embed, PARTS) - half[:, None]
    b_log -= _load_features(p_maximum + i_image * D.features, D)[None, :]
    m = m_t[:, None] & (tl.arange(0, D.features_p) < D.features)[None, :]
    b_phi = rounded(tl.exp(tl.where(m, b_log, float("-inf"))), DTYPE)
    b_dv = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
    if ADD_V:
        b_dv += load_rows(p_dv, i_image, o_t, m_t, DK, D).to(tl.float32)
    b_dv = times_matrix(b_phi, p_d_sums, b_dv, D.features, D.embed, PARTS)
    store_rows(p_dv, b_dv, i_image, o_t, m_t, DK, D)
    b_dphi = tl.zeros([BLOCK_T, tl.constexpr(D.features_p)], tl.float32)
    b_dphi += _load_features(p_d_normalizer + i_image * D.features, D)[None, :]
    b_dphi = times_transposed(b_v, p_d_sums, b_dphi, D.features, D.embed, PARTS)
    b_dlog = rounded(b_phi.to(tl.float32) * b_dphi, DTYPE)
    b_k = b_k.to(tl.float32)
    b_dk = -b_k * tl.sum(b_dlog.to(tl.float32), 1)[:, None]
    b_dk = times_matrix(b_dlog, p_w, b_dk, D.features, D.embed, PARTS)
    store_rows(p_dk, tl.where(tl.abs(b_k) <= _LARGEST, b_dk, 0.0), i_image, o_t, m_t, DK, D)


def attention_launch(tensor: Tensor, sizes: Sizes) -> tuple[Launch, dict]:
    """Tiles and options of the kernels."""
    how = launch(
        table(tensor.device).attention, tensor.dtype, sizes.embed, sizes.features, sizes.hidden
    )
    options = {"BLOCK_T": how.block_t, "PARTS": part_count(tensor.dtype)}
    # Left to itself, the assembler spills to fit one block more.
    return how, options | {"num_warps": how.warps, "num_stages": how.stages, "maxnreg": 255}


def _chunk(tokens: int, block_t: int) -> int:
    """Tokens of a chunk: whole tiles, as evenly shared as about _CHUNK tokens allow."""
    tiles = triton.cdiv(tokens, block_t)
    about = max(1, round(tiles * block_t / _CHUNK))
    counts = range(about - about // 4, about + about // 4 + 1)
    return min((-tiles % count, triton.cdiv(tiles, count)) for count in counts)[1] * block_t


def log_eps_term(eps: float, features: int) -> float:
    """log(eps·m); anything without eps."""
    return math.log(eps) + math.log(features) if eps > 0 else 0.0


def combine(
    parts: list[Tensor], sizes: Sizes, dtype: torch.dtype, result: list[Tensor] | None = None
) -> Tensor:
    """S̄ in parts, from c, Z and S of chunks (B, chunks, …); of the image in ``result``, if given."""
    batch, chunks = parts[0].shape[:2]
    count = part_count(dtype)
    means = parts[0].new_empty((batch, count, sizes.features, sizes.embed), dtype=dtype)
    with device_guard(means):
        performer_attention_combine_kernel[(batch, triton.cdiv(sizes.features, _COMBINED))](
            *parts,
            *(result or (None, None, None)),
            means,
            chunks,
            D=sizes,
            PARTS=count,
            BLOCK_M=_COMBINED,
            num_warps=4,
        )
    return means


def attend_queries(
    q: Tensor, w: Tensor, maximum: Tensor, normalizer: Tensor, means: Tensor, eps: float
) -> Tensor:
    sizes = Sizes(w.shape[2], w.shape[1])
    batch, tokens, embed = q.shape
    how, options = attention_launch(q, sizes)
    y = q.new_empty((batch, tokens, embed))
    with device_guard(q):
        performer_attention_queries_kernel[(batch * triton.cdiv(tokens, how.block_t),)](
            q,
            w,
            maximum,
            normalizer,
            means,
            y,
            tokens,
            log_eps_term(eps, w.shape[1]),
            D=sizes,
            Q=strides(q),
            Y=strides(y),
            HAS_EPS=eps > 0,
            **options,
        )
    return y


def sum_keys(k: Tensor, v: Tensor, w: Tensor) -> tuple[list[Tensor], Tensor]:
    """c, Z and S of the images, and S̄ in parts."""
    features, embed = w.shape[1:]
    batch, tokens = v.shape[:2]
    sizes = Sizes(embed, features)
    how, options = attention_launch(v, sizes)
    chunk = _chunk(tokens, how.block_t)
    chunks = triton.cdiv(tokens, chunk)
    parts, result = (
        [
            v.new_empty((*shape, *size), dtype=torch.float32)
            for size in ((features,), (features,), (features, embed))
        ]
        for shape in ((batch, chunks), (batch,))
    )
    with device_guard(v):
        for first in range(0, features, _FEATURES):
            performer_attention_keys_kernel[(batch * chunks,)](
                k,
                v,
                w[:, first:],
                *(part[:, :, first:] for part in parts),
                tokens,
                chunk,
                D=Sizes(embed, min(_FEATURES, features - first)),
                ALL=features,
                K=strides(k),
                V=strides(v),
                **options,
            )
    return result, combine(parts, sizes, v.dtype, result)


def performer_attention(
    k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_offsets("performer_attention", k, q, v)
    batch, tokens, embed = v.shape
    if batch == 0:
        features = w.shape[0]
        sums = [
            v.new_empty(shape, dtype=torch.float32)
            for shape in ((0, features), (0, features), (0, features, embed))
        ]
        return v.new_empty(v.shape), *sums
    w = in_parts(w, v.dtype)
    sums, means = sum_keys(k, v, w)
    return attend_queries(q, w, *sums[:2], means, eps), *sums


def attention_backward(
    dy: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    w: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    means: Tensor,
    eps: float,
    gradients: tuple[Tensor, Tensor, Tensor],
    add_v: bool,
) -> None:
    """Write dq, dk and dv to ``gradients``; with ``add_v``, dv is added to what is there."""
    (q, k, v), (dq, dk, dv) = qkv, gradients
    sizes = Sizes(w.shape[2], w.shape[1])
    batch, tokens = v.shape[:2]
    how, options = attention_launch(v, sizes)
    chunk = _chunk(tokens, how.block_t)
    chunks, size = triton.cdiv(tokens, chunk), sizes.features * (sizes.embed + 1)
    parts = v.new_empty((batch * chunks, size), dtype=torch.float32)
    d_sums, d_normalizer = torch.empty_like(means), torch.empty_like(normalizer)
    with device_guard(v):
        performer_attention_bwd_queries_kernel[(batch * chunks,)](
            dy,
            q,
            w,
            maximum,
            normalizer,
            means,
            dq,
            parts,
            tokens,
            chunk,
            log_eps_term(eps, w.shape[1]),
            D=sizes,
            DY=strides(dy),
            Q=strides(q),
            DQ=strides(dq),
            HAS_EPS=eps > 0,
            **options,
        )
        performer_attention_bwd_combine_kernel[(batch, triton.cdiv(sizes.features, _COMBINED))](
            parts,
            normalizer,
            d_sums,
            d_normalizer,
            chunks,
            D=sizes,
            PARTS=options["PARTS"],
            BLOCK_M=_COMBINED,
            num_warps=4,
        )
        performer_attention_bwd_keys_kernel[(batch * triton.cdiv(tokens, how.block_t),)](
            k,
            v,
            w,
            maximum,
            d_sums,
            d_normalizer,
            dk,
            dv,
            tokens,
            D=sizes,
            K=strides(k),
            V=strides(v),
            DK=strides(dk),
            ADD_V=add_v,
            **options,
        )


def performer_attention_backward(
    grad: Tensor,
    k: Tensor,
    q: Tensor,
    v: Tensor,
    w: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    sums: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_offsets("performer_attention", grad, k, q, v)
    dq, dk, dv = (v.new_empty(v.shape) for _ in range(3))
    if v.shape[0] > 0:
        w = in_parts(w, v.dtype)
        saved = [tensor.unsqueeze(1) for tensor in (maximum, normalizer, sums)]
        means = combine(saved, Sizes(w.shape[2], w.shape[1]), v.dtype)
        attention_backward(
            grad, (q, k, v), w, maximum, normalizer, means, eps, (dq, dk, dv), add_v=False
        )
    return dk, dq, dv


torch.library.impl("t2t_triton::performer_attention", IMPL_DEVICES)(performer_attention)
torch.library.impl("t2t_triton::performer_attention_backward", IMPL_DEVICES)(
    performer_attention_backward
)
