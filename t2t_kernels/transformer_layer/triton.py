"""The T2T layer with softmax attention in Triton, of the kernels of the operations that it consists of.

q, k and v are computed once per pass, side by side in a (B, T, 3E) scratch tensor of the map's dtype. Forward:
the projection, and the attention with the tail. Backward: the projection again, the tail, the attention,
and the projection's gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    IMPL_DEVICES,
    check_offsets,
    device_guard,
    load_rows,
    store_rows,
    strides,
    table,
)
from t2t_kernels._triton.tail import NORM_EPS, pack_tail, tail, tail_backward
from t2t_kernels.soft_split_linear.triton import Projection, soft_split_linear
from t2t_kernels.token_attention.triton import attend_tokens, attention_backward, launch_tiles


@triton.jit
def transformer_layer_attend_kernel(
    p_qkv,  # (B, T, 3E)
    p_tail,  # (D.tail,)
    p_out,  # (B, T, E)
    p_q,  # (B, T, E): q and k again, for the backward
    p_k,  # (B, T, E)
    p_attended,  # (B, T, E) float32: y
    p_maximum,  # (B, T) float32
    p_normalizer,  # (B, T) float32
    tokens,
    scale,
    D: tl.constexpr,
    QKV: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    R: tl.constexpr = D.contiguous
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_image = i_image * tokens * D.embed
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_q = load_rows(p_qkv, i_image, o_t, m_t, QKV, D)
    store_rows(p_q + o_image, b_q.to(tl.float32), 0, o_t, m_t, R, D)
    b_k = load_rows(p_qkv + D.embed, i_image, o_t, m_t, QKV, D)
    store_rows(p_k + o_image, b_k.to(tl.float32), 0, o_t, m_t, R, D)
    b_y, maximum, normalizer = attend_tokens(
        b_q,
        p_qkv + D.embed,
        p_qkv + 2 * D.embed,
        i_image,
        tokens,
        scale,
        D,
        QKV,
        QKV,
        EVEN,
        BLOCK_S,
    )
    store_rows(p_attended + o_image, b_y, 0, o_t, m_t, R, D)
    tl.store(p_maximum + i_image * tokens + o_t, maximum, mask=m_t)
    tl.store(p_normalizer + i_image * tokens + o_t, normalizer, mask=m_t)
    b_v = load_rows(p_qkv + 2 * D.embed, i_image, o_t, m_t, QKV, D).to(tl.float32)
    b_out = tail(b_y, b_v, p_tail, None, o_t, 0, 0.0, D)
    store_rows(p_out + o_image, b_out, 0, o_t, m_t, R, D)


def transformer_layer(
    x: Tensor, norm1_weight: Tensor, norm1_bias: Tensor, attn_qkv_weight: Tensor, *rest
) -> tuple[Tensor, ...]:
    *parameters, kernel_size, stride, padding, scale = rest
    check_offsets("transformer_layer", x)
    qkv = soft_split_linear(
        x,
        attn_qkv_weight,
        None,
        norm1_weight,
        norm1_bias,
        kernel_size,
        stride,
        padding,
        NORM_EPS.value,
    )
    batch, tokens = qkv.shape[:2]
    packed, sizes = pack_tail(parameters)
    out, q, k = (x.new_empty((batch, tokens, sizes.embed)) for _ in range(3))
    attended = x.new_empty((batch, tokens, sizes.embed), dtype=torch.float32)
    maximum, normalizer = (x.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    if batch > 0:
        tiles, options = launch_tiles(table(x.device).softmax, q)
        with device_guard(x):
            transformer_layer_attend_kernel[(batch * tiles,)](
                qkv,
                packed,
                out,
                q,
                k,
                attended,
                maximum,
                normalizer,
                tokens,
                scale,
                D=sizes,
                QKV=strides(qkv),
                **options,
            )
    return out, q, k, attended, maximum, normalizer


def transformer_layer_backward(
    grad: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    attn_qkv_weight: Tensor,
    *rest,
) -> tuple[Tensor, ...]:
    *parameters, q, k, attended, maximum, normalizer = rest[:-5]
    kernel_size, stride, padding, scale, need_x = rest[-5:]
    check_offsets("transformer_layer", x, grad)
    projection = Projection(
        x,
        attn_qkv_weight,
        None,
        norm1_weight,
        norm1_bias,
        kernel_size,
        stride,
        padding,
        NORM_EPS.value,
        need_x,
    )
    v = projection.y.chunk(3, -1)[2]
    dqkv = torch.empty_like(projection.y)
    gradients = dqkv.chunk(3, -1)
    dy, grad_tail = tail_backward(grad, attended, v, parameters, None, 0.0, gradients[2])
    if x.shape[0] > 0:
        attention_backward(
            dy, (q, k, v), attended, maximum, normalizer, scale, gradients, add_v=True
        )
    grad_x, grad_weight, _, *grad_norm = projection.backward(dqkv)
    return grad_x, *grad_norm, grad_weight, *grad_tail


torch.library.impl("t2t_triton::transformer_layer", IMPL_DEVICES)(transformer_layer)
torch.library.impl("t2t_triton::transformer_layer_backward", IMPL_DEVICES)(
    transformer_layer_backward
)
