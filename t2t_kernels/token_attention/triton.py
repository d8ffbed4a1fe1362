"""Softmax attention in Triton, no T×T matrix in memory (FlashAttention-2's order of work).

With p_ts = e^(scale·q_t·k_s) / Σ: y_t = Σ_s p_ts v_s. Backward, with d_t = dy_t·y_t and
g_ts = p_ts (dy_t·v_s − d_t): dv_s = Σ_t p_ts dy_t, dk_s = scale Σ_t g_ts q_t and
dq_t = scale Σ_s g_ts k_s.
A program owns the rows that it writes and walks over all others, so every sum has a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    IMPL_DEVICES,
    SMALLEST_SIDE,
    Launch,
    Sizes,
    check_offsets,
    device_guard,
    dot,
    load_rows,
    padded,
    rounded,
    store_rows,
    strides,
    table,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
# A scale of 0 would make NaN of the -inf that stands for no key.
_LEAST_FACTOR = tl.constexpr(1e-30)


@triton.jit
def attend_tokens(
    b_q,
    p_k,
    p_v,
    i_image,
    tokens,
    scale,
    D: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y of a tile of queries, the maximum of scale·q·k and Σ_s e^(scale·q·k_s − maximum).

    EVEN: BLOCK_S divides the tokens.
    """
    DTYPE: tl.constexpr = b_q.dtype
    BLOCK_T: tl.constexpr = b_q.shape[0]
    # The maximum wanted is that of scale·q·k: the sign goes to q, where it costs nothing.
    b_q = rounded(tl.where(scale < 0, -1.0, 1.0) * b_q.to(tl.float32), DTYPE)
    factor = tl.maximum(tl.abs(scale) * _LOG2_E, _LEAST_FACTOR)
    maximum = tl.full([BLOCK_T], float("-inf"), tl.float32)
    normalizer = tl.zeros([BLOCK_T], tl.float32)
    b_y = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < tokens
        b_k = load_rows(p_k, i_image, o_s, m_s, K, D, not EVEN)
        b_v = load_rows(p_v, i_image, o_s, m_s, V, D, not EVEN)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        if not EVEN:
            b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        larger = tl.maximum(maximum, tl.max(b_s, 1))
        # As long as all scores are −infinity, all weights are zero.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        # The difference before the factor: what rounding is left vanishes with it.
        shrink = tl.exp2((maximum - shift) * factor)
        b_p = tl.exp2((b_s - shift[:, None]) * factor)
        normalizer = normalizer * shrink + tl.sum(b_p, 1)
        b_y = dot(rounded(b_p, DTYPE), b_v, b_y * shrink[:, None])
        maximum = larger
    return b_y / normalizer[:, None], maximum * tl.abs(scale), normalizer


@triton.jit
def token_attention_fwd_kernel(
    p_q,  # (B, T, E)
    p_k,  # (B, T, E)
    p_v,  # (B, T, E)
    p_y,  # (B, T, E)
    p_attended,  # (B, T, E) float32, or None if y is
    p_maximum,  # (B, T) float32
    p_normalizer,  # (B, T) float32
    tokens,
    scale,
    D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    Y: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_q = load_rows(p_q, i_image, o_t, m_t, Q, D)
    b_y, maximum, normalizer = attend_tokens(
        b_q, p_k, p_v, i_image, tokens, scale, D, K, V, EVEN, BLOCK_S
    )
    store_rows(p_y, b_y, i_image, o_t, m_t, Y, D)
    if p_attended is not None:
        store_rows(p_attended, b_y, i_image, o_t, m_t, Y, D)
    tl.store(p_maximum + i_image * tokens + o_t, maximum, mask=m_t)
    tl.store(p_normalizer + i_image * tokens + o_t, normalizer, mask=m_t)


@triton.jit
def _probabilities(b_s, maximum, logarithm, scale):
    """p from q·k and the query's maximum and log₂ of its normaliser."""
    return tl.exp2((b_s * scale - maximum) * _LOG2_E - logarithm)


@triton.jit
def token_attention_bwd_queries_kernel(
    p_dy,  # (B, T, E)
    p_q,  # (B, T, E)
    p_k,  # (B, T, E)
    p_v,  # (B, T, E)
    p_attended,  # (B, T, E) float32
    p_maximum,  # (B, T) float32
    p_normalizer,  # (B, T) float32
    p_dq,  # (B, T, E)
    p_scalars,  # (2, B·T) float32: d and log₂ of the normaliser
    tokens,
    scale,
    D: tl.constexpr,
    DY: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DQ: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dq; for the keys, d and log₂ of the normaliser."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_dy = load_rows(p_dy, i_image, o_t, m_t, DY, D)
    R: tl.constexpr = D.contiguous
    b_y = load_rows(p_attended + i_image * tokens * D.embed, 0, o_t, m_t, R, D)
    delta = tl.sum(b_dy.to(tl.float32) * b_y, 1)
    b_q = load_rows(p_q, i_image, o_t, m_t, Q, D)
    o_row = i_image * tokens + o_t
    maximum = tl.load(p_maximum + o_row, mask=m_t, other=0.0)
    logarithm = tl.log2(tl.load(p_normalizer + o_row, mask=m_t, other=1.0))
    tl.store(p_scalars + o_row, delta, mask=m_t)
    count = (tl.num_programs(0) // tiles).to(tl.int64) * tokens
    tl.store(p_scalars + count + o_row, logarithm, mask=m_t)
    b_dq = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < tokens
        b_k = load_rows(p_k, i_image, o_s, m_s, K, D, not EVEN)
        b_v = load_rows(p_v, i_image, o_s, m_s, V, D, not EVEN)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_p = _probabilities(b_s, maximum[:, None], logarithm[:, None], scale)
        b_g = dot(b_dy, tl.trans(b_v), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_g = b_p * (b_g - delta[:, None])
        if not EVEN:
            b_g = tl.where(m_s[None, :], b_g, 0.0)
        b_dq = dot(rounded(b_g, DTYPE), b_k, b_dq)
    store_rows(p_dq, b_dq * scale, i_image, o_t, m_t, DQ, D)


@triton.jit
def token_attention_bwd_keys_kernel(
    p_dy,  # (B, T, E)
    p_q,  # (B, T, E)
    p_k,  # (B, T, E)
    p_v,  # (B, T, E)
    p_maximum,  # (B, T) float32
    p_scalars,  # (2, B·T) float32: d and log₂ of the normaliser
    p_dk,  # (B, T, E)
    p_dv,  # (B, T, E)
    tokens,
    scale,
    D: tl.constexpr,
    DY: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DK: tl.constexpr,
    ADD_V: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dk and dv of BLOCK_T keys; with ADD_V, dv is added to what is there."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_k = load_rows(p_k, i_image, o_t, m_t, K, D)
    b_v = load_rows(p_v, i_image, o_t, m_t, V, D)
    p_maximum += i_image * tokens
    p_delta = p_scalars + i_image * tokens
    p_logarithm = p_delta + (tl.num_programs(0) // tiles).to(tl.int64) * tokens
    b_dk = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
    b_dv = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < tokens
        b_q = load_rows(p_q, i_image, o_s, m_s, Q, D, not EVEN)
        b_dy = load_rows(p_dy, i_image, o_s, m_s, DY, D, not EVEN)
        # A query with an infinite maximum attends to nothing: here, those beyond the last token.
        maximum = tl.load(p_maximum + o_s, mask=m_s, other=float("inf"))
        logarithm = tl.load(p_logarithm + o_s, mask=m_s, other=0.0)
        delta = tl.load(p_delta + o_s, mask=m_s, other=0.0)
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_p = _probabilities(b_s, maximum[None, :], logarithm[None, :], scale)
        b_dv = dot(rounded(b_p, DTYPE), b_dy, b_dv)
        b_g = dot(b_v, tl.trans(b_dy), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_dk = dot(rounded(b_p * (b_g - delta[None, :]), DTYPE), b_q, b_dk)
    if ADD_V:
        b_dv += load_rows(p_dv, i_image, o_t, m_t, DK, D).to(tl.float32)
    store_rows(p_dk, b_dk * scale, i_image, o_t, m_t, DK, D)
    store_rows(p_dv, b_dv, i_image, o_t, m_t, DK, D)


def launch_tiles(pair: tuple[Launch, Launch], v: Tensor) -> tuple[int, dict]:
    """Tiles an image, and the constants and options of a kernel whose program owns one of them."""
    exact = v.dtype == torch.float32
    how = pair[exact]
    tokens, embed = v.shape[1:]
    # Tiles of twice as wide rows have half as many; in float32, held split, a quarter.
    narrower = max(1, padded(embed) // 64) ** (1 + exact)
    block_t, block_s = (max(SMALLEST_SIDE, side // narrower) for side in (how.block_t, how.block_s))
    options = {
        "EVEN": tokens % block_s == 0,
        "BLOCK_T": block_t,
        "BLOCK_S": block_s,
        "num_warps": how.warps,
        "num_stages": how.stages,
        # Left to itself, the assembler spills to fit one block more.
        "maxnreg": 255 if narrower > 1 and not exact else None,
    }
    return triton.cdiv(tokens, block_t), options


def token_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    check_offsets("token_attention", q, k, v)
    batch, tokens, embed = v.shape
    y = v.new_empty(v.shape)
    exact = v.dtype == torch.float32
    attended = v.new_empty((0,) if exact else v.shape, dtype=torch.float32)
    maximum, normalizer = (v.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    if batch == 0:
        return y, attended, maximum, normalizer
    tiles, options = launch_tiles(table(v.device).softmax, v)
    with device_guard(v):
        token_attention_fwd_kernel[(batch * tiles,)](
            q,
            k,
            v,
            y,
            None if exact else attended,
            maximum,
            normalizer,
            tokens,
            scale,
            D=Sizes(embed),
            Q=strides(q),
            K=strides(k),
            V=strides(v),
            Y=strides(y),
            **options,
        )
    return y, attended, maximum, normalizer


def attention_backward(
    dy: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    attended: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    scale: float,
    gradients: tuple[Tensor, Tensor, Tensor],
    add_v: bool,
) -> None:
    """Write dq, dk and dv to ``gradients``; with ``add_v``, dv is added to what is there."""
    (q, k, v), (dq, dk, dv) = qkv, gradients
    batch, tokens, embed = v.shape
    scalars = maximum.new_empty((2, batch * tokens))
    tiles, options = launch_tiles(table(v.device).softmax_backward, v)
    options |= {
        "D": Sizes(embed),
        "DY": strides(dy),
        "Q": strides(q),
        "K": strides(k),
        "V": strides(v),
    }
    with device_guard(v):
        token_attention_bwd_queries_kernel[(batch * tiles,)](
            dy,
            q,
            k,
            v,
            attended,
            maximum,
            normalizer,
            dq,
            scalars,
            tokens,
            scale,
            DQ=strides(dq),
            **options,
        )
        token_attention_bwd_keys_kernel[(batch * tiles,)](
            dy,
            q,
            k,
            v,
            maximum,
            scalars,
            dk,
            dv,
            tokens,
            scale,
            DK=strides(dk),
            ADD_V=add_v,
            **options,
        )


def token_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_offsets("token_attention", grad, q, k, v)
    gradients = tuple(v.new_empty(v.shape) for _ in range(3))
    if v.shape[0] > 0:
        attention_backward(
            grad, (q, k, v), attended, maximum, normalizer, scale, gradients, add_v=False
        )
    return gradients


torch.library.impl("t2t_triton::token_attention", IMPL_DEVICES)(token_attention)
torch.library.impl("t2t_triton::token_attention_backward", IMPL_DEVICES)(token_attention_backward)
