"""The T2T layer with Performer attention in Triton, of the kernels of the operations that it consists of.

k, q and v are computed once per pass, side by side in a (B, T, 3E) scratch tensor of the map's dtype. Forward:
the projection, the sums over keys, and the queries with the tail. Backward: the projection and y again, the
tail, the attention, and the projection's gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    IMPL_DEVICES,
    Sizes,
    check_offsets,
    device_guard,
    load_rows,
    store_rows,
    strides,
)
from t2t_kernels._triton.matrix import in_parts
from t2t_kernels._triton.tail import NORM_EPS, dropout_numbers, pack_tail, tail, tail_backward
from t2t_kernels.performer_attention.triton import (
    attend,
    attend_queries,
    attention_backward,
    attention_launch,
    combine,
    log_eps_term,
    sum_keys,
)
from t2t_kernels.soft_split_linear.triton import Projection, soft_split_linear


@triton.jit(do_not_specialize=["threshold"])
def performer_layer_attend_kernel(
    p_kqv,  # (B, T, 3E)
    p_w,  # (PARTS, m, E)
    p_maximum,  # (B, m) float32
    p_normalizer,  # (B, m) float32
    p_means,  # (B, PARTS, m, E)
    p_tail,  # (D.tail,)
    p_seed,  # (1,) int64, or None without dropout
    p_out,  # (B, T, E)
    tokens,
    log_eps,
    threshold,
    scale,
    D: tl.constexpr,
    KQV: tl.constexpr,
    HAS_EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_T)
    R: tl.constexpr = D.contiguous
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    o_image = i_image * tokens * D.embed
    b_q = load_rows(p_kqv + D.embed, i_image, o_t, m_t, KQV, D)
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
    b_v = load_rows(p_kqv + 2 * D.embed, i_image, o_t, m_t, KQV, D).to(tl.float32)
    b_out = tail(b_y, b_v, p_tail, p_seed, o_image + o_t * D.embed, threshold, scale, D)
    store_rows(p_out + o_image, b_out, 0, o_t, m_t, R, D)


def performer_layer(
    x: Tensor,
    w: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    kqv_weight: Tensor,
    kqv_bias: Tensor,
    *rest,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *parameters, seed, kernel_size, stride, padding, eps, dropout_p = rest
    check_offsets("performer_layer", x)
    features, embed = w.shape
    norm1 = (norm1_weight, norm1_bias)
    kqv = soft_split_linear(
        x, kqv_weight, kqv_bias, *norm1, kernel_size, stride, padding, NORM_EPS.value
    )
    batch, tokens = kqv.shape[:2]
    out = x.new_empty((batch, tokens, embed))
    if batch == 0:
        sums = [
            x.new_empty(shape, dtype=torch.float32)
            for shape in ((0, features), (0, features), (0, features, embed))
        ]
        return out, *sums
    w = in_parts(w, x.dtype)
    k, q, v = kqv.chunk(3, -1)
    sums, means = sum_keys(k, v, w)
    packed, sizes = pack_tail(parameters)
    how, options = attention_launch(q, Sizes(embed, features, sizes.hidden))
    with device_guard(x):
        performer_layer_attend_kernel[(batch * triton.cdiv(tokens, how.block_t),)](
            kqv,
            w,
            *sums[:2],
            means,
            packed,
            seed if dropout_p > 0 else None,
            out,
            tokens,
            log_eps_term(eps, features),
            *dropout_numbers(dropout_p),
            D=Sizes(embed, features, sizes.hidden),
            KQV=strides(kqv),
            HAS_EPS=eps > 0,
            **options,
        )
    return out, *sums


def performer_layer_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    kqv_weight: Tensor,
    kqv_bias: Tensor,
    *rest,
) -> tuple[Tensor, ...]:
    *parameters, seed, maximum, normalizer, sums = rest[:-6]
    kernel_size, stride, padding, eps, dropout_p, need_x = rest[-6:]
    check_offsets("performer_layer", x, grad)
    projection = Projection(
        x,
        kqv_weight,
        kqv_bias,
        norm1_weight,
        norm1_bias,
        kernel_size,
        stride,
        padding,
        NORM_EPS.value,
        need_x,
    )
    kqv = projection.y
    dkqv = torch.empty_like(kqv)
    k, q, v = kqv.chunk(3, -1)
    dk, dq, dv = dkqv.chunk(3, -1)
    if x.shape[0] > 0:
        w = in_parts(w, x.dtype)
        saved = [tensor.unsqueeze(1) for tensor in (maximum, normalizer, sums)]
        means = combine(saved, Sizes(w.shape[2], w.shape[1]), x.dtype)
        y = attend_queries(q, w, maximum, normalizer, means, eps)
    else:
        y = q
    dy, grad_tail = tail_backward(grad, y, v, parameters, seed, dropout_p, dv)
    if x.shape[0] > 0:
        attention_backward(
            dy, (q, k, v), w, maximum, normalizer, means, eps, (dq, dk, dv), add_v=True
        )
    grad_x, grad_weight, grad_bias, *grad_norm = projection.backward(dkqv)
    return grad_x, *grad_norm, grad_weight, grad_bias, *grad_tail


torch.library.impl("t2t_triton::performer_layer", IMPL_DEVICES)(performer_layer)
torch.library.impl("t2t_triton::performer_layer_backward", IMPL_DEVICES)(performer_layer_backward)
