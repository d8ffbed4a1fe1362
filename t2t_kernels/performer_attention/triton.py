"""Performer attention in Triton: two passes over the tokens in each direction.

Forward: the sums over keys, a part per chunk of tokens; then the queries, each program merging its
image's parts first. Backward: the queries, with a part of the sums' gradients per chunk; then the keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    IMPL_DEVICES,
    check_offsets,
    device_guard,
    dot,
    launch,
    padded,
    table,
)
from t2t_kernels._triton.performer import (
    CHUNK,
    add_keys,
    attend,
    attend_backward,
    keys_backward,
    load_features,
    load_gradient_of_sums,
    load_rows,
    load_sums,
    log_eps_term,
    merge_sums,
    store_rows,
    store_sums,
)


@triton.jit
def performer_attention_keys_kernel(
    p_k,
    p_v,
    p_w,
    p_maximum,
    p_normalizer,
    p_sums,
    k_stride_b,
    k_stride_t,
    k_stride_e,
    v_stride_b,
    v_stride_t,
    v_stride_e,
    tokens,
    chunks,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    i_image = i_part // chunks
    start = tl.program_id(0) % chunks * CHUNK
    b_w = load_features(p_w, FEATURES, FEATURES_P, EMBED, EMBED_P)
    maximum = tl.full([FEATURES_P], float("-inf"), tl.float32)
    normalizer = tl.zeros([FEATURES_P], tl.float32)
    sums = tl.zeros([FEATURES_P, EMBED_P], tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, tokens), BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_k = load_rows(p_k + i_image * k_stride_b, o_t, m_t, k_stride_t, k_stride_e, EMBED, EMBED_P)
        b_v = load_rows(p_v + i_image * v_stride_b, o_t, m_t, v_stride_t, v_stride_e, EMBED, EMBED_P)
        maximum, normalizer, sums = add_keys(b_k, b_v, m_t, b_w, maximum, normalizer, sums, BLOCK_T,
                                             FEATURES_P)  # fmt: skip
    store_sums(p_maximum + i_part * FEATURES, p_normalizer + i_part * FEATURES,
               p_sums + i_part * (FEATURES * EMBED), maximum, normalizer, sums, FEATURES, FEATURES_P,
               EMBED, EMBED_P)  # fmt: skip


@triton.jit
def performer_attention_queries_kernel(
    p_q,
    p_w,
    p_part_maximum,
    p_part_normalizer,
    p_part_sums,
    p_y,
    p_maximum,
    p_normalizer,
    p_sums,
    stride_b,
    stride_t,
    stride_e,
    tokens,
    chunks,
    log_eps,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_EPS: tl.constexpr,
):
    i_image = (tl.program_id(0) // chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % chunks
    b_w = load_features(p_w, FEATURES, FEATURES_P, EMBED, EMBED_P)
    i_part = i_image * chunks
    maximum, normalizer, sums = merge_sums(
        p_part_maximum + i_part * FEATURES, p_part_normalizer + i_part * FEATURES,
        p_part_sums + i_part * (FEATURES * EMBED), chunks, FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    if i_chunk == 0:
        store_sums(p_maximum + i_image * FEATURES, p_normalizer + i_image * FEATURES,
                   p_sums + i_image * (FEATURES * EMBED), maximum, normalizer, sums, FEATURES,
                   FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    start = i_chunk * CHUNK
    for first in range(start, tl.minimum(start + CHUNK, tokens), BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_q = load_rows(p_q + i_image * stride_b, o_t, m_t, stride_t, stride_e, EMBED, EMBED_P)
        b_y, b_f, divisor, slope = attend(b_q, b_w, maximum, normalizer, sums, log_eps, BLOCK_T, FEATURES,
                                          FEATURES_P, EMBED_P, HAS_EPS)  # fmt: skip
        store_rows(p_y + i_image * tokens * EMBED, b_y, o_t, m_t, EMBED, EMBED_P)


@triton.jit
def performer_attention_bwd_queries_kernel(
    p_grad,
    p_q,
    p_w,
    p_maximum,
    p_normalizer,
    p_sums,
    p_dq,
    p_d_normalizer,
    p_d_sums,
    grad_stride_b,
    grad_stride_t,
    grad_stride_e,
    stride_b,
    stride_t,
    stride_e,
    tokens,
    chunks,
    log_eps,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_EPS: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    i_image = i_part // chunks
    start = tl.program_id(0) % chunks * CHUNK
    b_w = load_features(p_w, FEATURES, FEATURES_P, EMBED, EMBED_P)
    maximum, normalizer, sums = load_sums(
        p_maximum + i_image * FEATURES, p_normalizer + i_image * FEATURES,
        p_sums + i_image * (FEATURES * EMBED), FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    d_normalizer = tl.zeros([FEATURES_P], tl.float32)
    d_sums = tl.zeros([FEATURES_P, EMBED_P], tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, tokens), BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_q = load_rows(p_q + i_image * stride_b, o_t, m_t, stride_t, stride_e, EMBED, EMBED_P)
        b_dy = load_rows(p_grad + i_image * grad_stride_b, o_t, m_t, grad_stride_t, grad_stride_e,
                         EMBED, EMBED_P)  # fmt: skip
        b_y, b_f, divisor, slope = attend(b_q, b_w, maximum, normalizer, sums, log_eps, BLOCK_T, FEATURES,
                                          FEATURES_P, EMBED_P, HAS_EPS)  # fmt: skip
        b_dq, b_dn, dd = attend_backward(b_dy, b_y, b_q, b_f, divisor, slope, b_w, normalizer, sums,
                                         BLOCK_T, FEATURES_P, EMBED_P)  # fmt: skip
        store_rows(p_dq + i_image * tokens * EMBED, b_dq, o_t, m_t, EMBED, EMBED_P)
        d_normalizer += tl.sum(b_f * dd[:, None], 0)
        d_sums = dot(tl.trans(b_f), b_dn, d_sums)
    o_m = tl.arange(0, FEATURES_P)
    tl.store(p_d_normalizer + i_part * FEATURES + o_m, d_normalizer, mask=o_m < FEATURES)
    store_rows(p_d_sums + i_part * (FEATURES * EMBED), d_sums, o_m, o_m < FEATURES, EMBED, EMBED_P)


@triton.jit
def performer_attention_bwd_keys_kernel(
    p_k,
    p_v,
    p_w,
    p_maximum,
    p_d_normalizer,
    p_d_sums,
    p_dk,
    p_dv,
    k_stride_b,
    k_stride_t,
    k_stride_e,
    v_stride_b,
    v_stride_t,
    v_stride_e,
    tokens,
    chunks,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_image = (tl.program_id(0) // chunks).to(tl.int64)
    start = tl.program_id(0) % chunks * CHUNK
    b_w = load_features(p_w, FEATURES, FEATURES_P, EMBED, EMBED_P)
    o_m = tl.arange(0, FEATURES_P)
    maximum = tl.load(p_maximum + i_image * FEATURES + o_m, mask=o_m < FEATURES, other=0.0)
    i_part = i_image * chunks
    d_normalizer, d_sums = load_gradient_of_sums(
        p_d_normalizer + i_part * FEATURES, p_d_sums + i_part * (FEATURES * EMBED), chunks, FEATURES,
        FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    for first in range(start, tl.minimum(start + CHUNK, tokens), BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_k = load_rows(p_k + i_image * k_stride_b, o_t, m_t, k_stride_t, k_stride_e, EMBED, EMBED_P)
        b_v = load_rows(p_v + i_image * v_stride_b, o_t, m_t, v_stride_t, v_stride_e, EMBED, EMBED_P)
        b_dk, b_dv = keys_backward(b_k, b_v, m_t, b_w, maximum, d_normalizer, d_sums, BLOCK_T,
                                   FEATURES_P, EMBED_P)  # fmt: skip
        store_rows(p_dk + i_image * tokens * EMBED, b_dk, o_t, m_t, EMBED, EMBED_P)
        store_rows(p_dv + i_image * tokens * EMBED, b_dv, o_t, m_t, EMBED, EMBED_P)


def _shape(v: Tensor, w: Tensor) -> tuple[int, dict, dict]:
    """Chunks per image, the kernels' constants, and how they are launched."""
    features, embed = w.shape
    how = launch(table(v.device).attention, v.dtype, padded(embed))
    constants = {
        "FEATURES": features,
        "FEATURES_P": padded(features),
        "EMBED": embed,
        "EMBED_P": padded(embed),
        "CHUNK": CHUNK,
        "BLOCK_T": how.block_t,
    }
    options = {"num_warps": how.warps, "num_stages": how.stages}
    return triton.cdiv(v.shape[1], CHUNK), constants, options


def performer_attention(
    k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_offsets("performer_attention", k, q, v)
    chunks, constants, options = _shape(v, w)
    batch, tokens, embed = v.shape
    features = w.shape[0]
    w = w.contiguous()
    y = v.new_empty((batch, tokens, embed))
    maximum, normalizer = (v.new_empty((batch, features), dtype=torch.float32) for _ in range(2))
    sums = v.new_empty((batch, features, embed), dtype=torch.float32)
    if batch == 0:
        return y, maximum, normalizer, sums
    parts = [v.new_empty((batch * chunks, features), dtype=torch.float32) for _ in range(2)]
    parts.append(v.new_empty((batch * chunks, features, embed), dtype=torch.float32))
    grid = (batch * chunks,)
    with device_guard(v):
        performer_attention_keys_kernel[grid](
            k, v, w, *parts, *k.stride(), *v.stride(), tokens, chunks, **constants, **options
        )
        performer_attention_queries_kernel[grid](
            q,
            w,
            *parts,
            y,
            maximum,
            normalizer,
            sums,
            *q.stride(),
            tokens,
            chunks,
            log_eps_term(eps, w.shape[0]),
            **constants,
            HAS_EPS=eps > 0,
            **options,
        )
    return y, maximum, normalizer, sums


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
    chunks, constants, options = _shape(v, w)
    batch, tokens, embed = v.shape
    features = w.shape[0]
    w = w.contiguous()
    dk, dq, dv = (v.new_empty((batch, tokens, embed)) for _ in range(3))
    if batch == 0:
        return dk, dq, dv
    d_normalizer = v.new_empty((batch * chunks, features), dtype=torch.float32)
    d_sums = v.new_empty((batch * chunks, features, embed), dtype=torch.float32)
    grid = (batch * chunks,)
    with device_guard(v):
        performer_attention_bwd_queries_kernel[grid](
            grad,
            q,
            w,
            maximum,
            normalizer,
            sums,
            dq,
            d_normalizer,
            d_sums,
            *grad.stride(),
            *q.stride(),
            tokens,
            chunks,
            log_eps_term(eps, w.shape[0]),
            **constants,
            HAS_EPS=eps > 0,
            **options,
        )
        performer_attention_bwd_keys_kernel[grid](
            k,
            v,
            w,
            maximum,
            d_normalizer,
            d_sums,
            dk,
            dv,
            *k.stride(),
            *v.stride(),
            tokens,
            chunks,
            **constants,
            **options,
        )
    return dk, dq, dv


torch.library.impl("t2t_triton::performer_attention", IMPL_DEVICES)(performer_attention)
torch.library.impl("t2t_triton::performer_attention_backward", IMPL_DEVICES)(
    performer_attention_backward
)
