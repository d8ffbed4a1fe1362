"""Softmax attention on tiles of tokens, no T×T matrix in memory (FlashAttention-2's order of work).

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
    SMALLEST_SIDE,
    Launch,
    device_guard,
    dot,
    padded,
    rounded,
    table,
)
from t2t_kernels._triton.performer import load_rows, store_rows

_LOG2_E = tl.constexpr(1.4426950408889634)
# A scale of 0 would make NaN of the -inf that stands for no key.
_LEAST_FACTOR = tl.constexpr(1e-30)


@triton.jit
def load_tokens(p, o_t, m_t, stride_t, stride_e, MASKED: tl.constexpr, EMBED: tl.constexpr,
                EMBED_P: tl.constexpr):  # fmt: skip
    """Rows ``o_t`` of a (T, E) matrix in its own dtype, zero beyond it."""
    o_e = tl.arange(0, EMBED_P)
    p = p + o_t[:, None] * stride_t + o_e[None, :] * stride_e
    # Masks that are always true still take registers.
    if MASKED or EMBED != EMBED_P:
        return tl.load(p, mask=m_t[:, None] & (o_e < EMBED)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def attend_tokens(
    b_q,
    p_k,
    p_v,
    k_stride_t,
    k_stride_e,
    v_stride_t,
    v_stride_e,
    tokens,
    scale,
    EVEN: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y of a tile of queries, the maximum of scale·q·k and Σ_s e^(scale·q·k_s − maximum).

    EVEN: BLOCK_S divides the tokens.
    """
    DTYPE: tl.constexpr = b_q.dtype
    # The maximum wanted is that of scale·q·k: the sign goes to q, where it costs nothing.
    b_q = rounded(tl.where(scale < 0, -1.0, 1.0) * b_q.to(tl.float32), DTYPE)
    factor = tl.maximum(tl.abs(scale) * _LOG2_E, _LEAST_FACTOR)
    maximum = tl.full([BLOCK_T], float("-inf"), tl.float32)
    normalizer = tl.zeros([BLOCK_T], tl.float32)
    b_y = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < tokens
        b_k = load_tokens(p_k, o_s, m_s, k_stride_t, k_stride_e, not EVEN, EMBED, EMBED_P)
        b_v = load_tokens(p_v, o_s, m_s, v_stride_t, v_stride_e, not EVEN, EMBED, EMBED_P)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        if not EVEN:
            b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        larger = tl.maximum(maximum, tl.max(b_s, 1))
        # The difference before the factor: what rounding is left vanishes with it.
        shrink = tl.exp2((maximum - larger) * factor)
        b_p = tl.exp2((b_s - larger[:, None]) * factor)
        normalizer = normalizer * shrink + tl.sum(b_p, 1)
        b_y = dot(rounded(b_p, DTYPE), b_v, b_y * shrink[:, None])
        maximum = larger
    return b_y / normalizer[:, None], maximum * tl.abs(scale), normalizer


@triton.jit
def _probabilities(b_s, maximum, logarithm, scale):
    """p from q·k and the query's maximum and log₂ of its normaliser."""
    return tl.exp2((b_s * scale - maximum) * _LOG2_E - logarithm)


@triton.jit
def token_attention_bwd_queries_kernel(
    p_dy,
    p_q,
    p_k,
    p_v,
    p_attended,
    p_maximum,
    p_normalizer,
    p_dq,
    p_delta,
    p_logarithm,
    dy_stride_b,
    dy_stride_t,
    dy_stride_e,
    q_stride_b,
    q_stride_t,
    q_stride_e,
    k_stride_b,
    k_stride_t,
    k_stride_e,
    v_stride_b,
    v_stride_t,
    v_stride_e,
    tokens,
    tiles,
    scale,
    EVEN: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dq; for the keys, d and log₂ of the normaliser."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_dy = load_tokens(p_dy + i_image * dy_stride_b, o_t, m_t, dy_stride_t, dy_stride_e, True,
                       EMBED, EMBED_P)  # fmt: skip
    b_y = load_rows(p_attended + i_image * tokens * EMBED, o_t, m_t, EMBED, 1, EMBED, EMBED_P)
    delta = tl.sum(b_dy.to(tl.float32) * b_y, 1)
    tl.store(p_delta + i_image * tokens + o_t, delta, mask=m_t)

    b_q = load_tokens(p_q + i_image * q_stride_b, o_t, m_t, q_stride_t, q_stride_e, True, EMBED,
                      EMBED_P)  # fmt: skip
    maximum = tl.load(p_maximum + i_image * tokens + o_t, mask=m_t, other=0.0)
    logarithm = tl.log2(tl.load(p_normalizer + i_image * tokens + o_t, mask=m_t, other=1.0))
    tl.store(p_logarithm + i_image * tokens + o_t, logarithm, mask=m_t)
    p_k += i_image * k_stride_b
    p_v += i_image * v_stride_b
    b_dq = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < tokens
        b_k = load_tokens(p_k, o_s, m_s, k_stride_t, k_stride_e, not EVEN, EMBED, EMBED_P)
        b_v = load_tokens(p_v, o_s, m_s, v_stride_t, v_stride_e, not EVEN, EMBED, EMBED_P)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_p = _probabilities(b_s, maximum[:, None], logarithm[:, None], scale)
        b_g = dot(b_dy, tl.trans(b_v), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_g = b_p * (b_g - delta[:, None])
        if not EVEN:
            b_g = tl.where(m_s[None, :], b_g, 0.0)
        b_dq = dot(rounded(b_g, DTYPE), b_k, b_dq)
    store_rows(p_dq + i_image * tokens * EMBED, b_dq * scale, o_t, m_t, EMBED, EMBED_P)


@triton.jit
def token_attention_bwd_keys_kernel(
    p_dy,
    p_q,
    p_k,
    p_v,
    p_maximum,
    p_logarithm,
    p_delta,
    p_dk,
    p_dv,
    dy_stride_b,
    dy_stride_t,
    dy_stride_e,
    q_stride_b,
    q_stride_t,
    q_stride_e,
    k_stride_b,
    k_stride_t,
    k_stride_e,
    v_stride_b,
    v_stride_t,
    v_stride_e,
    tokens,
    tiles,
    scale,
    ADD_V: tl.constexpr,
    EVEN: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dk and dv of BLOCK_T keys; with ADD_V, dv is added to what is there."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_k = load_tokens(p_k + i_image * k_stride_b, o_t, m_t, k_stride_t, k_stride_e, True, EMBED,
                      EMBED_P)  # fmt: skip
    b_v = load_tokens(p_v + i_image * v_stride_b, o_t, m_t, v_stride_t, v_stride_e, True, EMBED,
                      EMBED_P)  # fmt: skip
    p_q += i_image * q_stride_b
    p_dy += i_image * dy_stride_b
    p_maximum += i_image * tokens
    p_logarithm += i_image * tokens
    p_delta += i_image * tokens
    b_dk = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_dv = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    for first in range(0, tokens, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < tokens
        b_q = load_tokens(p_q, o_s, m_s, q_stride_t, q_stride_e, not EVEN, EMBED, EMBED_P)
        b_dy = load_tokens(p_dy, o_s, m_s, dy_stride_t, dy_stride_e, not EVEN, EMBED, EMBED_P)
        # Whose maximum is infinite attends to nothing.
        maximum = tl.load(p_maximum + o_s, mask=m_s, other=float("inf"))
        logarithm = tl.load(p_logarithm + o_s, mask=m_s, other=0.0)
        delta = tl.load(p_delta + o_s, mask=m_s, other=0.0)
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_p = _probabilities(b_s, maximum[None, :], logarithm[None, :], scale)
        b_dv = dot(rounded(b_p, DTYPE), b_dy, b_dv)
        b_g = dot(b_v, tl.trans(b_dy), tl.zeros([BLOCK_T, BLOCK_S], tl.float32))
        b_dk = dot(rounded(b_p * (b_g - delta[None, :]), DTYPE), b_q, b_dk)
    p_dv += i_image * tokens * EMBED
    if ADD_V:
        b_dv += load_tokens(p_dv, o_t, m_t, EMBED, 1, True, EMBED, EMBED_P).to(tl.float32)
    store_rows(p_dk + i_image * tokens * EMBED, b_dk * scale, o_t, m_t, EMBED, EMBED_P)
    store_rows(p_dv, b_dv, o_t, m_t, EMBED, EMBED_P)


def launch_tiles(pair: tuple[Launch, Launch], v: Tensor) -> tuple[int, dict]:
    """Tiles an image, and the constants and options of a kernel whose program owns one of them."""
    exact = v.dtype == torch.float32
    how = pair[exact]
    tokens, embed = v.shape[1:]
    # Tiles of twice as wide rows have half as many; in float32, held split, a quarter.
    narrower = max(1, padded(embed) // 64) ** (1 + exact)
    block_t, block_s = (
        max(SMALLEST_SIDE, side // narrower) for side in (how.block_t, how.block_s)
    )
    options = {
        "EVEN": tokens % block_s == 0,
        "EMBED": embed,
        "EMBED_P": padded(embed),
        "BLOCK_T": block_t,
        "BLOCK_S": block_s,
        "num_warps": how.warps,
        "num_stages": how.stages,
        # Left to itself, the assembler spills to fit one block more.
        "maxnreg": 255 if narrower > 1 and not exact else None,
    }
    return triton.cdiv(tokens, block_t), options


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    scale: float,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; what ``dv`` holds already, if it is given, is added to."""
    batch, tokens = v.shape[:2]
    add = dv is not None
    dq, dk = v.new_empty(v.shape), v.new_empty(v.shape)
    dv = dv if add else v.new_empty(v.shape)
    if batch == 0:
        return dq, dk, dv
    delta, logarithm = torch.empty_like(maximum), torch.empty_like(maximum)
    tiles, options = launch_tiles(table(v.device).softmax_backward, v)
    strides = (*dy.stride(), *q.stride(), *k.stride(), *v.stride())
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
            delta,
            logarithm,
            *strides,
            tokens,
            tiles,
            scale,
            **options,
        )
        token_attention_bwd_keys_kernel[(batch * tiles,)](
            dy,
            q,
            k,
            v,
            maximum,
            logarithm,
            delta,
            dk,
            dv,
            *strides,
            tokens,
            tiles,
            scale,
            ADD_V=add,
            **options,
        )
    return dq, dk, dv
