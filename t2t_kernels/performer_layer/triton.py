"""The T2T layer with Performer attention in Triton, fused from the map to the map.

Forward, three launches: the packed weight; patches → k, v → sums over keys, a part per chunk; patches
→ q, v → attention → projection, skip, MLP. k, q and v are computed where they are needed and
never stored. Backward, four launches and the clearing of the map's gradient: the packed weight; the
tail and the queries, with the sums' gradients per chunk; everything that leads to k, q and v, one
tile at a time, and from there to the weight and the map; the sums of the parameters' gradients.
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
    rounded,
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
from t2t_kernels._triton.split import (
    geometry,
    output_block,
    pack_weight,
    patch_statistics,
    project,
    rows_per_band,
    slot_count,
    split_backward_tile,
    token_corners,
    unpack_gradient,
)
from t2t_kernels._triton.tail import (
    AFTER_MLP,
    AFTER_PROJ,
    NORM_EPS,
    kept,
    sum_tail_gradients,
    tail_backward,
    tail_forward,
    tail_output,
    tail_slot_size,
)
from t2t_kernels.philox import rounded_probability
from t2t_kernels.soft_split_linear.ops import like_map


@triton.jit
def performer_layer_keys_kernel(
    p_x,
    p_packed,
    p_kqv_bias,
    p_norm_weight,
    p_norm_bias,
    p_w,
    p_maximum,
    p_normalizer,
    p_sums,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    rows,
    columns,
    chunks,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
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
    p_image = p_x + i_part // chunks * stride_b
    start = tl.program_id(0) % chunks * CHUNK
    stop = tl.minimum(start + CHUNK, rows * columns)
    maximum = tl.full([FEATURES_P], float("-inf"), tl.float32)
    normalizer = tl.zeros([FEATURES_P], tl.float32)
    sums = tl.zeros([FEATURES_P, EMBED_P], tl.float32)
    for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < stop
        o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
        mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w, height,
                                      width, NORM_EPS, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
        b_k, b_q, b_v = project(p_image, p_packed, p_kqv_bias, p_norm_weight, p_norm_bias, o_y, o_x,
                                m_t, mean, rstd, stride_c, stride_h, stride_w, height, width,
                                CHANNELS, KERNEL, FLAT, BLOCK_J, EMBED, EMBED_P, BLOCK_T, True,
                                False)  # fmt: skip
        maximum, normalizer, sums = add_keys(b_k, b_v, m_t, p_w, maximum, normalizer, sums, BLOCK_T,
                                             FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    store_sums(p_maximum + i_part * FEATURES_ALL, p_normalizer + i_part * FEATURES_ALL,
               p_sums + i_part * (FEATURES_ALL * EMBED), maximum, normalizer, sums, FEATURES, FEATURES_P,
               EMBED, EMBED_P)  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def performer_layer_queries_kernel(
    p_x,
    p_packed,
    p_kqv_bias,
    p_norm_weight,
    p_norm_bias,
    p_w,
    p_proj_weight,
    p_proj_bias,
    p_norm2_weight,
    p_norm2_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    p_mlp2_weight,
    p_mlp2_bias,
    p_seed,
    p_part_maximum,
    p_part_normalizer,
    p_part_sums,
    p_out,
    p_maximum,
    p_normalizer,
    p_sums,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    rows,
    columns,
    chunks,
    log_eps,
    threshold,
    scale,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    i_image = (tl.program_id(0) // chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % chunks
    tokens = rows * columns
    p_image = p_x + i_image * stride_b
    p_maximum += i_image * FEATURES
    p_normalizer += i_image * FEATURES
    p_sums += i_image * (FEATURES * EMBED)
    i_part = i_image * chunks
    merge_sums(p_part_maximum + i_part * FEATURES, p_part_normalizer + i_part * FEATURES,
               p_part_sums + i_part * (FEATURES * EMBED), p_maximum, p_normalizer, p_sums, chunks,
               FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
    stop = tl.minimum(i_chunk * CHUNK + CHUNK, tokens)
    for first in tl.range(i_chunk * CHUNK, stop, BLOCK_T, disable_licm=True):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < stop
        o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
        mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w, height,
                                      width, NORM_EPS, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
        b_k, b_q, b_v = project(p_image, p_packed, p_kqv_bias, p_norm_weight, p_norm_bias, o_y, o_x,
                                m_t, mean, rstd, stride_c, stride_h, stride_w, height, width,
                                CHANNELS, KERNEL, FLAT, BLOCK_J, EMBED, EMBED_P, BLOCK_T, False,
                                True)  # fmt: skip
        b_y, b_f, divisor, slope = attend(b_q, p_w, p_maximum, p_normalizer, p_sums, log_eps, BLOCK_T,
                                          FEATURES, FEATURES_P, EMBED, EMBED_P, HAS_EPS)  # fmt: skip
        b_keep = b_v
        if HAS_DROPOUT:
            element = (i_image * tokens + o_t) * EMBED
            b_keep = kept(p_seed, element, AFTER_PROJ, threshold, scale, EMBED, EMBED_P, BLOCK_T)
        b_a, b_n, rstd2, b_z, b_h = tail_forward(
            b_y, b_v, b_keep, p_proj_weight, p_proj_bias, p_norm2_weight, p_norm2_bias, p_mlp1_weight,
            p_mlp1_bias, DTYPE, HAS_DROPOUT, EMBED, EMBED_P, HIDDEN, HIDDEN_P, BLOCK_T)  # fmt: skip
        if HAS_DROPOUT:
            element = (i_image * tokens + o_t) * EMBED
            b_keep = kept(p_seed, element, AFTER_MLP, threshold, scale, EMBED, EMBED_P, BLOCK_T)
        b_out = tail_output(b_a, b_h, b_keep, p_mlp2_weight, p_mlp2_bias, DTYPE, HAS_DROPOUT, EMBED,
                            EMBED_P, HIDDEN, HIDDEN_P, BLOCK_T)  # fmt: skip
        store_rows(p_out + i_image * tokens * EMBED, b_out, o_t, m_t, EMBED, EMBED_P)


@triton.jit(do_not_specialize=["threshold"])
def performer_layer_bwd_tail_kernel(
    p_grad,
    p_x,
    p_packed,
    p_kqv_bias,
    p_norm_weight,
    p_norm_bias,
    p_w,
    p_proj_weight,
    p_proj_bias,
    p_norm2_weight,
    p_norm2_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    p_mlp2_weight,
    p_seed,
    p_maximum,
    p_normalizer,
    p_sums,
    p_d_parts,
    p_slots,
    grad_stride_b,
    grad_stride_t,
    grad_stride_e,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    rows,
    columns,
    chunks,
    items,
    slot_size,
    log_eps,
    threshold,
    scale,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """Gradients of the tail's parameters (to the slot) and of the sums over keys (per chunk)."""
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * slot_size
    tokens = rows * columns
    started = tl.full((), 0, tl.int32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image = (item // chunks).to(tl.int64)
        p_image = p_x + i_image * stride_b
        p_part = p_d_parts + (i_image * chunks + item % chunks) * (FEATURES_P * (EMBED_P + 1))
        start = item % chunks * CHUNK
        stop = tl.minimum(start + CHUNK, tokens)
        for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
            o_t = first + tl.arange(0, BLOCK_T)
            m_t = o_t < stop
            o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
            mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w,
                                          height, width, NORM_EPS, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
            b_k, b_q, b_v = project(p_image, p_packed, p_kqv_bias, p_norm_weight, p_norm_bias, o_y,
                                    o_x, m_t, mean, rstd, stride_c, stride_h, stride_w, height, width,
                                    CHANNELS, KERNEL, FLAT, BLOCK_J, EMBED, EMBED_P, BLOCK_T, False,
                                    True)  # fmt: skip
            b_y, b_f, divisor, slope = attend(b_q, p_w, p_maximum + i_image * FEATURES,
                                              p_normalizer + i_image * FEATURES,
                                              p_sums + i_image * (FEATURES * EMBED), log_eps, BLOCK_T,
                                              FEATURES, FEATURES_P, EMBED, EMBED_P, HAS_EPS)  # fmt: skip
            b_keep_proj = b_v
            if HAS_DROPOUT:
                element = (i_image * tokens + o_t) * EMBED
                b_keep_proj = kept(p_seed, element, AFTER_PROJ, threshold, scale, EMBED, EMBED_P, BLOCK_T)
            b_a, b_n, rstd2, b_z, b_h = tail_forward(
                b_y, b_v, b_keep_proj, p_proj_weight, p_proj_bias, p_norm2_weight, p_norm2_bias,
                p_mlp1_weight, p_mlp1_bias, DTYPE, HAS_DROPOUT, EMBED, EMBED_P, HIDDEN, HIDDEN_P,
                BLOCK_T)  # fmt: skip
            b_keep_mlp = b_v
            if HAS_DROPOUT:
                element = (i_image * tokens + o_t) * EMBED
                b_keep_mlp = kept(p_seed, element, AFTER_MLP, threshold, scale, EMBED, EMBED_P, BLOCK_T)
            b_dout = load_rows(p_grad + i_image * grad_stride_b, o_t, m_t, grad_stride_t,
                               grad_stride_e, EMBED, EMBED_P)  # fmt: skip
            b_da, b_dy = tail_backward(
                b_dout, b_y, b_n, rstd2, b_z, b_h, b_keep_proj, b_keep_mlp, p_proj_weight,
                p_norm2_weight, p_mlp1_weight, p_mlp2_weight, p_slot, started, DTYPE, HAS_DROPOUT,
                EMBED, EMBED_P, HIDDEN, HIDDEN_P, BLOCK_T, True)  # fmt: skip
            started = tl.full((), 1, tl.int32)
            add_gradient_of_sums(p_part, b_dy, b_y, b_f, divisor, first - start, FEATURES_P, EMBED_P)
            # The next tile adds to what other threads of this one stored.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["threshold"])
def performer_layer_bwd_split_kernel(
    p_grad,
    p_x,
    p_packed,
    p_kqv_bias,
    p_norm_weight,
    p_norm_bias,
    p_w,
    p_proj_weight,
    p_proj_bias,
    p_norm2_weight,
    p_norm2_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    p_mlp2_weight,
    p_seed,
    p_maximum,
    p_normalizer,
    p_sums,
    p_d_parts,
    p_d_sums,
    p_scratch,
    p_waiting,
    p_slots,
    p_grad_x,
    grad_stride_b,
    grad_stride_t,
    grad_stride_e,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    rows,
    columns,
    grad_x_stride_b,
    grad_x_stride_c,
    grad_x_stride_h,
    grad_x_stride_w,
    chunks,
    items,
    bands,
    rows_per_band,
    slot_size,
    log_eps,
    threshold,
    scale,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    FEATURES: tl.constexpr,
    FEATURES_P: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NEED_X: tl.constexpr,
):
    """Gradients of k, q and v of one tile at a time, and from them of weight, norm and map."""
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    COLUMNS: tl.constexpr = 3 * EMBED_P
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * slot_size
    p_tile = p_scratch + tl.program_id(0).to(tl.int64) * (BLOCK_T * COLUMNS)
    p_wait = p_waiting + tl.program_id(0).to(tl.int64) * (BLOCK_T * EMBED_P)
    tokens = rows * columns
    started = tl.full((), 0, tl.int32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image = (item // bands).to(tl.int64)
        first_row = item % bands * rows_per_band
        last_row = tl.minimum(first_row + rows_per_band, rows)
        # Tokens of earlier rows reach down into this band of pixels.
        reach = (KERNEL - 1) // STRIDE if NEED_X else 0
        first_pixel_row = tl.maximum(first_row * STRIDE - PADDING, 0)
        last_pixel_row = tl.where(
            last_row == rows, height, tl.minimum(last_row * STRIDE - PADDING, height)
        )
        p_image = p_x + i_image * stride_b
        p_d = p_d_sums + i_image * (FEATURES_P * (EMBED_P + 1))
        start = tl.maximum(first_row - reach, 0) * columns
        stop = last_row * columns
        for first in tl.range(start, stop, BLOCK_T, disable_licm=True):
            # Before the loop, it would share its addresses with what follows, and keep them alive.
            if first == start:
                sum_gradients_of_sums(p_d_parts + i_image * chunks * (FEATURES_P * (EMBED_P + 1)), p_d,
                                      chunks, FEATURES_P, EMBED_P)  # fmt: skip
            o_t = first + tl.arange(0, BLOCK_T)
            m_t = o_t < stop
            m_own = m_t & (o_t >= first_row * columns)
            o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
            mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w,
                                          height, width, NORM_EPS, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
            b_k, b_q, b_v = project(p_image, p_packed, p_kqv_bias, p_norm_weight, p_norm_bias, o_y,
                                    o_x, m_t, mean, rstd, stride_c, stride_h, stride_w, height, width,
                                    CHANNELS, KERNEL, FLAT, BLOCK_J, EMBED, EMBED_P, BLOCK_T, True,
                                    True)  # fmt: skip
            # What is not needed yet, or done, waits in memory; its registers are needed.
            o_wait = tl.arange(0, BLOCK_T)[:, None] * EMBED_P + tl.arange(0, EMBED_P)[None, :]
            tl.store(p_wait + o_wait, b_q)
            b_dk, b_dv = keys_backward(b_k, b_v, m_t, p_w, p_maximum + i_image * FEATURES, p_d, BLOCK_T,
                                       FEATURES, FEATURES_P, EMBED, EMBED_P)  # fmt: skip
            o_tile = tl.arange(0, BLOCK_T)[:, None] * COLUMNS + tl.arange(0, EMBED_P)[None, :]
            tl.store(p_tile + o_tile, rounded(b_dk, DTYPE))
            tl.store(p_tile + o_tile + 2 * EMBED_P, rounded(b_dv, DTYPE))
            tl.debug_barrier()
            b_q = tl.load(p_wait + o_wait)
            b_y, b_f, divisor, slope = attend(b_q, p_w, p_maximum + i_image * FEATURES,
                                              p_normalizer + i_image * FEATURES,
                                              p_sums + i_image * (FEATURES * EMBED), log_eps, BLOCK_T,
                                              FEATURES, FEATURES_P, EMBED, EMBED_P, HAS_EPS)  # fmt: skip
            b_keep_proj = b_v
            if HAS_DROPOUT:
                element = (i_image * tokens + o_t) * EMBED
                b_keep_proj = kept(p_seed, element, AFTER_PROJ, threshold, scale, EMBED, EMBED_P, BLOCK_T)
            b_a, b_n, rstd2, b_z, b_h = tail_forward(
                b_y, b_v, b_keep_proj, p_proj_weight, p_proj_bias, p_norm2_weight, p_norm2_bias,
                p_mlp1_weight, p_mlp1_bias, DTYPE, HAS_DROPOUT, EMBED, EMBED_P, HIDDEN, HIDDEN_P,
                BLOCK_T)  # fmt: skip
            b_keep_mlp = b_v
            if HAS_DROPOUT:
                element = (i_image * tokens + o_t) * EMBED
                b_keep_mlp = kept(p_seed, element, AFTER_MLP, threshold, scale, EMBED, EMBED_P, BLOCK_T)
            b_dout = load_rows(p_grad + i_image * grad_stride_b, o_t, m_t, grad_stride_t,
                               grad_stride_e, EMBED, EMBED_P)  # fmt: skip
            b_da, b_dy = tail_backward(
                b_dout, b_y, b_n, rstd2, b_z, b_h, b_keep_proj, b_keep_mlp, p_proj_weight,
                p_norm2_weight, p_mlp1_weight, p_mlp2_weight, p_slot, started, DTYPE, HAS_DROPOUT,
                EMBED, EMBED_P, HIDDEN, HIDDEN_P, BLOCK_T, False)  # fmt: skip
            b_dv = tl.load(p_tile + o_tile + 2 * EMBED_P).to(tl.float32)
            tl.store(p_tile + o_tile + 2 * EMBED_P, rounded(b_dv + b_da, DTYPE))
            b_dq = attend_backward(b_dy, b_y, b_q, b_f, divisor, slope, p_w,
                                   p_normalizer + i_image * FEATURES,
                                   p_sums + i_image * (FEATURES * EMBED), BLOCK_T, FEATURES, FEATURES_P,
                                   EMBED, EMBED_P)  # fmt: skip
            tl.store(p_tile + o_tile + EMBED_P, rounded(b_dq, DTYPE))
            # The rows are read back by other threads than stored them.
            tl.debug_barrier()
            split_backward_tile(
                p_image, p_tile, p_packed, p_norm_weight, p_slot, p_grad_x + i_image * grad_x_stride_b,
                COLUMNS, 1, started, o_y, o_x, m_t, m_own, first_pixel_row, last_pixel_row, mean, rstd,
                stride_c, stride_h, stride_w, grad_x_stride_c, grad_x_stride_h, grad_x_stride_w,
                height, width, CHANNELS, KERNEL, FLAT, BLOCK_J, BLOCK_T, COLUMNS, EMBED, EMBED_P,
                BLOCK_O, True, NEED_X,
            )  # fmt: skip
            started = tl.full((), 1, tl.int32)
            # The next tile adds to what other threads of this one stored.
            tl.debug_barrier()


def _layer_constants(x: Tensor, w: Tensor, mlp_weight: Tensor) -> dict:
    (features, embed), hidden = w.shape, mlp_weight.shape[0]
    return {
        "FEATURES": features,
        "FEATURES_P": padded(features),
        "EMBED": embed,
        "EMBED_P": padded(embed),
        "HIDDEN": hidden,
        "HIDDEN_P": padded(hidden),
    }


def _dropout(dropout_p: float) -> tuple[int, float]:
    """The smallest number that keeps an element, and the factor of what is kept."""
    dropped = rounded_probability(dropout_p)
    return round(dropped * 2**16), 0.0 if dropped == 1 else 1 / (1 - dropped)


def performer_layer(
    x: Tensor,
    w: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    kqv_weight: Tensor,
    kqv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    mlp_0_weight: Tensor,
    mlp_0_bias: Tensor,
    mlp_2_weight: Tensor,
    mlp_2_bias: Tensor,
    seed: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_offsets("performer_layer", x)
    split, constants = geometry(x, kernel_size, stride, padding)
    batch, (features, embed) = x.shape[0], w.shape
    out = x.new_empty((batch, split.tokens, embed))
    maximum, normalizer = (x.new_empty((batch, features), dtype=torch.float32) for _ in range(2))
    sums = x.new_empty((batch, features, embed), dtype=torch.float32)
    if batch == 0:
        return out, maximum, normalizer, sums
    w = random_features(w)
    norm1_weight, norm1_bias, kqv_bias = (
        tensor.contiguous() for tensor in (norm1_weight, norm1_bias, kqv_bias)
    )
    tail = [
        tensor.contiguous()
        for tensor in (
            proj_weight,
            proj_bias,
            norm2_weight,
            norm2_bias,
            mlp_0_weight,
            mlp_0_bias,
            mlp_2_weight,
            mlp_2_bias,
        )
    ]
    constants |= _layer_constants(x, w, mlp_0_weight)
    packed = pack_weight(kqv_weight, 3, padded(embed), constants)
    chunks = triton.cdiv(split.tokens, CHUNK)
    parts = [x.new_empty((batch * chunks, features), dtype=torch.float32) for _ in range(2)]
    parts.append(x.new_empty((batch * chunks, features, embed), dtype=torch.float32))
    how = launch(table(x.device).forward, x.dtype, embed, features, mlp_0_weight.shape[0])
    grid = (batch * chunks,)
    with device_guard(x):
        without_mlp = {name: value for name, value in constants.items() if not name.startswith("HIDDEN")}
        for features_constants, first in blocks_of_features(constants):
            performer_layer_keys_kernel[grid](
                x,
                packed,
                kqv_bias,
                norm1_weight,
                norm1_bias,
                w[first:],
                *(part[:, first:] for part in parts),
                *split,
                chunks,
                **without_mlp | features_constants,
                CHUNK=CHUNK,
                BLOCK_T=how.block_t,
                num_warps=how.warps,
                num_stages=how.stages,
                # Left to itself, the assembler spills to fit one block more.
                maxnreg=255,
            )
        performer_layer_queries_kernel[grid](
            x,
            packed,
            kqv_bias,
            norm1_weight,
            norm1_bias,
            w,
            *tail,
            seed,
            *parts,
            out,
            maximum,
            normalizer,
            sums,
            *split,
            chunks,
            log_eps_term(eps, w.shape[0]),
            *_dropout(dropout_p),
            **constants,
            CHUNK=CHUNK,
            BLOCK_T=how.block_t,
            HAS_EPS=eps > 0,
            HAS_DROPOUT=dropout_p > 0,
            num_warps=how.warps,
            num_stages=how.stages,
            maxnreg=255,
        )
    return out, maximum, normalizer, sums


def performer_layer_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    kqv_weight: Tensor,
    kqv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    mlp_0_weight: Tensor,
    mlp_0_bias: Tensor,
    mlp_2_weight: Tensor,
    mlp_2_bias: Tensor,
    seed: Tensor | None,
    maximum: Tensor,
    normalizer: Tensor,
    sums: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
    dropout_p: float,
    need_x: bool,
) -> tuple[Tensor, ...]:
    check_offsets("performer_layer", x, grad)
    split, constants = geometry(x, kernel_size, stride, padding)
    batch, embed = x.shape[0], w.shape[1]
    w = random_features(w)
    norm1_weight, norm1_bias, kqv_bias = (
        tensor.contiguous() for tensor in (norm1_weight, norm1_bias, kqv_bias)
    )
    tail = [
        tensor.contiguous()
        for tensor in (
            proj_weight,
            proj_bias,
            norm2_weight,
            norm2_bias,
            mlp_0_weight,
            mlp_0_bias,
            mlp_2_weight,
            mlp_2_bias,
        )
    ]
    grad_x = like_map(x).zero_() if need_x else x.new_empty(0)
    layer = _layer_constants(x, w, mlp_0_weight)
    constants |= layer
    packed = pack_weight(kqv_weight, 3, padded(embed), constants)

    entry = table(x.device)
    how = launch(entry.backward, x.dtype, embed, w.shape[0], mlp_0_weight.shape[0])
    options = {"BLOCK_T": how.block_t, "num_warps": how.warps, "num_stages": how.stages}
    chunks = triton.cdiv(split.tokens, CHUNK)
    rows = rows_per_band(split.columns)
    bands = triton.cdiv(split.rows, rows)
    tail_size = tail_slot_size(layer["EMBED_P"], layer["HIDDEN_P"])
    slot_size = (packed.shape[0] + 1) * packed.shape[1]
    tail_slots = x.new_empty(
        (slot_count(entry.slots, batch * chunks, tail_size), tail_size), dtype=torch.float32
    )
    slots = x.new_empty(
        (slot_count(entry.slots, batch * bands, slot_size), slot_size), dtype=torch.float32
    )
    if batch == 0:
        tail_slots.zero_()
        slots.zero_()
    else:
        d_size = gradient_of_sums_size(layer["FEATURES_P"], layer["EMBED_P"])
        d_parts = x.new_empty((batch * chunks, d_size), dtype=torch.float32)
        d_sums = x.new_empty((batch, d_size), dtype=torch.float32)
        scratch = x.new_empty((slots.shape[0], how.block_t, packed.shape[1]))
        waiting = x.new_empty((slots.shape[0], how.block_t, layer["EMBED_P"]), dtype=torch.float32)
        common = (grad, x, packed, kqv_bias, norm1_weight, norm1_bias, w, *tail[:-1], seed)
        common += (maximum, normalizer, sums, d_parts)
        numbers = (log_eps_term(eps, w.shape[0]), *_dropout(dropout_p))
        flags = {"HAS_EPS": eps > 0, "HAS_DROPOUT": dropout_p > 0}
        with device_guard(x):
            performer_layer_bwd_tail_kernel[(tail_slots.shape[0],)](
                *common,
                tail_slots,
                *grad.stride(),
                *split,
                chunks,
                batch * chunks,
                tail_size,
                *numbers,
                **constants,
                CHUNK=CHUNK,
                **flags,
                **options,
            )
            performer_layer_bwd_split_kernel[(slots.shape[0],)](
                *common,
                d_sums,
                scratch,
                waiting,
                slots,
                grad_x,
                *grad.stride(),
                *split,
                *(grad_x.stride() if need_x else (0, 0, 0, 0)),
                chunks,
                batch * bands,
                bands,
                rows,
                slot_size,
                *numbers,
                **constants,
                BLOCK_O=min(32, output_block(packed.shape[1])),
                NEED_X=need_x,
                **flags,
                **options,
            )
    grad_tail = sum_tail_gradients(tail_slots, tail)
    grad_weight, grad_bias, grad_norm_weight, grad_norm_bias = unpack_gradient(
        slots, kqv_weight, packed, norm1_weight, norm1_bias, 3, constants
    )
    return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, *grad_tail


torch.library.impl("t2t_triton::performer_layer", IMPL_DEVICES)(performer_layer)
torch.library.impl("t2t_triton::performer_layer_backward", IMPL_DEVICES)(performer_layer_backward)
