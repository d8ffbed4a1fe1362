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
    launch,
    padded,
    random_features,
    table,
)
from t2t_kernels._triton.performer import (
    CHUNK,
    add_gradient_of_sums,
    add_keys,
    attend,
    attend_backward,
    blocks_of_features,
    gradient_of_sums_size,
    keys_backward,
    load_rows,
    log_eps_term,
    merge_sums,
    store_rows,
    store_sums,
    sum_gradients_of_sums,
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
    FEATURES_ALL: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The sums of FEATURES of an image's FEATURES_ALL random features; the pointers are to the first."""
    i_part = tl.program_id(0).to(tl.int64)
    i_image = i_part // chunks
    start = tl.program_id(0) % chunks * CHUNK
    stop = tl.minimum(start + CHUNK, tokens)
    maximum = tl.full([FEATURES_P], float("-inf"), tl.float32)
    normalizer = tl.zeros([FEATURES_P], tl.float32)
    sums = tl.zeros([FEATURES_P, EMBED_P], tl.float32)
    for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_k = load_rows(p_k + i_image * k_stride_b, o_t, m_t, k_stride_t, k_stride_e, EMBED, EMBED_P)
        b_v = load_rows(p_v + i_image * v_stride_b, o_t, m_t, v_stride_t, v_stride_e, EMBED, EMBED_P)
        maximum, normalizer, sums = add_keys(b_k, b_v, m_t, p_w, maximum, normalizer, sums, BLOCK_T,
                                             FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    store_sums(p_maximum + i_part * FEATURES_ALL, p_normalizer + i_part * FEATURES_ALL,
               p_sums + i_part * (FEATURES_ALL * EMBED), maximum, normalizer, sums, FEATURES, FEATURES_P,
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
    p_maximum += i_image * FEATURES
    p_normalizer += i_image * FEATURES
    p_sums += i_image * (FEATURES * EMBED)
    i_part = i_image * chunks
    merge_sums(p_part_maximum + i_part * FEATURES, p_part_normalizer + i_part * FEATURES,
               p_part_sums + i_part * (FEATURES * EMBED), p_maximum, p_normalizer, p_sums, chunks,
               FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    start = i_chunk * CHUNK
    stop = tl.minimum(start + CHUNK, tokens)
    for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_q = load_rows(p_q + i_image * stride_b, o_t, m_t, stride_t, stride_e, EMBED, EMBED_P)
        b_y, b_f, divisor, slope = attend(b_q, p_w, p_maximum, p_normalizer, p_sums, log_eps, BLOCK_T,
                                          FEATURES, FEATURES_P, EMBED, EMBED_P, HAS_EPS)  # fmt: skip
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
    p_d_parts,
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
    stop = tl.minimum(start + CHUNK, tokens)
    p_maximum += i_image * FEATURES
    p_normalizer += i_image * FEATURES
    p_sums += i_image * (FEATURES * EMBED)
    p_part = p_d_parts + i_part * (FEATURES_P * (EMBED_P + 1))
    for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_q = load_rows(p_q + i_image * stride_b, o_t, m_t, stride_t, stride_e, EMBED, EMBED_P)
        b_dy = load_rows(p_grad + i_image * grad_stride_b, o_t, m_t, grad_stride_t, grad_stride_e,
                         EMBED, EMBED_P)  # fmt: skip
        b_y, b_f, divisor, slope = attend(b_q, p_w, p_maximum, p_normalizer, p_sums, log_eps, BLOCK_T,
                                          FEATURES, FEATURES_P, EMBED, EMBED_P, HAS_EPS)  # fmt: skip
        add_gradient_of_sums(p_part, b_dy, b_y, b_f, divisor, first - start, FEATURES_P, EMBED_P)
        b_dq = attend_backward(b_dy, b_y, b_q, b_f, divisor, slope, p_w, p_normalizer, p_sums, BLOCK_T,
                               FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
        store_rows(p_dq + i_image * tokens * EMBED, b_dq, o_t, m_t, EMBED, EMBED_P)
        # The next tile adds to what other threads of this one stored.
        tl.debug_barrier()


@triton.jit
def performer_attention_bwd_keys_kernel(
    p_k,
    p_v,
    p_w,
    p_maximum,
    p_d_parts,
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
    stop = tl.minimum(start + CHUNK, tokens)
    p_maximum += i_image * FEATURES
    p_d_sums += i_image * (FEATURES_P * (EMBED_P + 1))
    sum_gradients_of_sums(p_d_parts + i_image * chunks * (FEATURES_P * (EMBED_P + 1)), p_d_sums, chunks,
                          FEATURES_P, EMBED_P)  # fmt: skip
    for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < tokens
        b_k = load_rows(p_k + i_image * k_stride_b, o_t, m_t, k_stride_t, k_stride_e, EMBED, EMBED_P)
        b_v = load_rows(p_v + i_image * v_stride_b, o_t, m_t, v_stride_t, v_stride_e, EMBED, EMBED_P)
        b_dk, b_dv = keys_backward(b_k, b_v, m_t, p_w, p_maximum, p_d_sums, BLOCK_T, FEATURES,
                                   FEATURES_P, EMBED, EMBED_P)  # fmt: skip
        store_rows(p_dk + i_image * tokens * EMBED, b_dk, o_t, m_t, EMBED, EMBED_P)
        store_rows(p_dv + i_image * tokens * EMBED, b_dv, o_t, m_t, EMBED, EMBED_P)


def _shape(v: Tensor, w: Tensor) -> tuple[int, dict, dict]:
    """Chunks per image, the kernels' constants, and how they are launched."""
    features, embed = w.shape
    how = launch(table(v.device).attention, v.dtype, embed, features)
    constants = {
        "FEATURES": features,
        "FEATURES_P": padded(features),
        "EMBED": embed,
        "EMBED_P": padded(embed),
        "CHUNK": CHUNK,
        "BLOCK_T": how.block_t,
    }
    options = {"num_warps": how.warps, "num_stages": how.stages}
    if v.dtype == torch.float32:
        # Left to itself, the assembler spills to fit one block more.
        options["maxnreg"] = 255
    return triton.cdiv(v.shape[1], CHUNK), constants, options


def performer_attention(
    k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_offsets("performer_attention", k, q, v)
    chunks, constants, options = _shape(v, w)
    batch, tokens, embed = v.shape
    features = w.shape[0]
    w = random_features(w)
    y = v.new_empty((batch, tokens, embed))
    maximum, normalizer = (v.new_empty((batch, features), dtype=torch.float32) for _ in range(2))
    sums = v.new_empty((batch, features, embed), dtype=torch.float32)
    if batch == 0:
        return y, maximum, normalizer, sums
    parts = [v.new_empty((batch * chunks, features), dtype=torch.float32) for _ in range(2)]
    parts.append(v.new_empty((batch * chunks, features, embed), dtype=torch.float32))
    grid = (batch * chunks,)
    with device_guard(v):
        for features_constants, first in blocks_of_features(constants):
            performer_attention_keys_kernel[grid](
                k,
                v,
                w[first:],
                *(part[:, first:] for part in parts),
                *k.stride(),
                *v.stride(),
                tokens,
                chunks,
                **constants | features_constants,
                **options,
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
    w = random_features(w)
    dk, dq, dv = (v.new_empty((batch, tokens, embed)) for _ in range(3))
    if batch == 0:
        return dk, dq, dv
    size = gradient_of_sums_size(constants["FEATURES_P"], constants["EMBED_P"])
    d_parts = v.new_empty((batch * chunks, size), dtype=torch.float32)
    d_sums = v.new_empty((batch, size), dtype=torch.float32)
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
            d_parts,
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
            d_parts,
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
