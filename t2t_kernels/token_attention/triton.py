"""Softmax attention in Triton: one launch forward, two backward (see ``_triton/attention.py``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import IMPL_DEVICES, check_offsets, device_guard, table
from t2t_kernels._triton.attention import (
    attend_tokens,
    attention_backward,
    launch_tiles,
    load_tokens,
)
from t2t_kernels._triton.performer import store_rows


@triton.jit
def token_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_y,
    p_attended,
    p_maximum,
    p_normalizer,
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
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_q = load_tokens(p_q + i_image * q_stride_b, o_t, m_t, q_stride_t, q_stride_e, True, EMBED,
                      EMBED_P)  # fmt: skip
    b_y, maximum, normalizer = attend_tokens(
        b_q, p_k + i_image * k_stride_b, p_v + i_image * v_stride_b, k_stride_t, k_stride_e,
        v_stride_t, v_stride_e, tokens, scale, EVEN, EMBED, EMBED_P, BLOCK_T, BLOCK_S)  # fmt: skip
    store_rows(p_y + i_image * tokens * EMBED, b_y, o_t, m_t, EMBED, EMBED_P)
    if p_attended is not None:
        store_rows(p_attended + i_image * tokens * EMBED, b_y, o_t, m_t, EMBED, EMBED_P)
    tl.store(p_maximum + i_image * tokens + o_t, maximum, mask=m_t)
    tl.store(p_normalizer + i_image * tokens + o_t, normalizer, mask=m_t)


def token_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    check_offsets("token_attention", q, k, v)
    batch, tokens = v.shape[:2]
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
            *q.stride(),
            *k.stride(),
            *v.stride(),
            tokens,
            tiles,
            scale,
            **options,
        )
    return y, attended, maximum, normalizer


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
    return attention_backward(grad, q, k, v, attended, maximum, normalizer, scale)


torch.library.impl("t2t_triton::token_attention", IMPL_DEVICES)(token_attention)
torch.library.impl("t2t_triton::token_attention_backward", IMPL_DEVICES)(token_attention_backward)
