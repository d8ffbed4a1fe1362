"""The T2T layer with softmax attention in Triton, fused from the map to the map.

Forward, three launches: the packed weight; patches → q, k, v; attention → projection, skip, MLP.
Backward, seven launches and the clearing of the map's gradient: the packed weight; the tail, which
projects v again; dq; dk and dv; what leads from there to the weight and the map, one tile at a
time; the sums of the tail's gradients and of the weight's.
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
    rounded,
    table,
)
from t2t_kernels._triton.attention import (
    attend_tokens,
    attention_backward,
    launch_tiles,
    load_tokens,
)
from t2t_kernels._triton.performer import load_rows, store_rows
from t2t_kernels._triton.split import (
    band_limits,
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
    NORM_EPS,
    sum_tail_gradients,
    tail_backward,
    tail_forward,
    tail_output,
    tail_slot_size,
)
from t2t_kernels.soft_split_linear.ops import like_map


@triton.jit
def transformer_layer_project_kernel(
    p_x,
    p_packed,
    p_norm_weight,
    p_norm_bias,
    p_q,
    p_k,
    p_v,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    rows,
    columns,
    tiles,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < rows * columns
    p_image = p_x + i_image * stride_b
    o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
    mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w, height,
                                  width, NORM_EPS, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
    b_q, b_k, b_v = project(p_image, p_packed, None, p_norm_weight, p_norm_bias, o_y, o_x, m_t,
                            mean, rstd, stride_c, stride_h, stride_w, height, width, CHANNELS,
                            KERNEL, FLAT, BLOCK_J, EMBED, EMBED_P, BLOCK_T, True, True)  # fmt: skip
    o_image = i_image * rows * columns * EMBED
    store_rows(p_q + o_image, b_q, o_t, m_t, EMBED, EMBED_P)
    store_rows(p_k + o_image, b_k, o_t, m_t, EMBED, EMBED_P)
    store_rows(p_v + o_image, b_v, o_t, m_t, EMBED, EMBED_P)


@triton.jit
def transformer_layer_attend_kernel(
    p_q,
    p_k,
    p_v,
    p_proj_weight,
    p_proj_bias,
    p_norm2_weight,
    p_norm2_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    p_mlp2_weight,
    p_mlp2_bias,
    p_out,
    p_attended,
    p_maximum,
    p_normalizer,
    tokens,
    tiles,
    scale,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    EVEN: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_image = i_image * tokens * EMBED
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_q = load_tokens(p_q + o_image, o_t, m_t, EMBED, 1, True, EMBED, EMBED_P)
    b_y, maximum, normalizer = attend_tokens(
        b_q, p_k + o_image, p_v + o_image, EMBED, 1, EMBED, 1, tokens, scale, EVEN, EMBED, EMBED_P,
        BLOCK_T, BLOCK_S)  # fmt: skip
    store_rows(p_attended + o_image, b_y, o_t, m_t, EMBED, EMBED_P)
    tl.store(p_maximum + i_image * tokens + o_t, maximum, mask=m_t)
    tl.store(p_normalizer + i_image * tokens + o_t, normalizer, mask=m_t)
    b_v = load_rows(p_v + o_image, o_t, m_t, EMBED, 1, EMBED, EMBED_P)
    b_a, b_n, rstd, b_z, b_h = tail_forward(
        b_y, b_v, b_v, p_proj_weight, p_proj_bias, p_norm2_weight, p_norm2_bias, p_mlp1_weight,
        p_mlp1_bias, DTYPE, False, EMBED, EMBED_P, HIDDEN, HIDDEN_P, BLOCK_T)  # fmt: skip
    b_out = tail_output(b_a, b_h, b_v, p_mlp2_weight, p_mlp2_bias, DTYPE, False, EMBED, EMBED_P,
                        HIDDEN, HIDDEN_P, BLOCK_T)  # fmt: skip
    store_rows(p_out + o_image, b_out, o_t, m_t, EMBED, EMBED_P)


@triton.jit
def transformer_layer_bwd_tail_kernel(
    p_grad,
    p_x,
    p_packed,
    p_norm_weight,
    p_norm_bias,
    p_proj_weight,
    p_proj_bias,
    p_norm2_weight,
    p_norm2_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    p_mlp2_weight,
    p_attended,
    p_v,
    p_dy,
    p_dv,
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
    tiles,
    items,
    slot_size,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """v again; gradients of the tail's parameters (to the slot), the attention and the skip."""
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * slot_size
    started = tl.full((), 0, tl.int32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image = (item // tiles).to(tl.int64)
        p_image = p_x + i_image * stride_b
        o_image = i_image * rows * columns * EMBED
        o_t = item % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < rows * columns
        o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
        mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w, height,
                                      width, NORM_EPS, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
        b_q, b_k, b_v = project(
            p_image, p_packed, None, p_norm_weight, p_norm_bias, o_y, o_x, m_t, mean, rstd, stride_c,
            stride_h, stride_w, height, width, CHANNELS, KERNEL, FLAT, BLOCK_J, EMBED, EMBED_P,
            BLOCK_T, False, False)  # fmt: skip
        store_rows(p_v + o_image, b_v, o_t, m_t, EMBED, EMBED_P)
        # As the forward read it back.
        b_v = rounded(b_v, DTYPE).to(tl.float32)
        b_y = load_rows(p_attended + o_image, o_t, m_t, EMBED, 1, EMBED, EMBED_P)
        b_a, b_n, rstd2, b_z, b_h = tail_forward(
            b_y, b_v, b_v, p_proj_weight, p_proj_bias, p_norm2_weight, p_norm2_bias, p_mlp1_weight,
            p_mlp1_bias, DTYPE, False, EMBED, EMBED_P, HIDDEN, HIDDEN_P, BLOCK_T)  # fmt: skip
        b_dout = load_rows(p_grad + i_image * grad_stride_b, o_t, m_t, grad_stride_t, grad_stride_e,
                           EMBED, EMBED_P)  # fmt: skip
        b_da, b_dy = tail_backward(
            b_dout, b_y, b_n, rstd2, b_z, b_h, b_v, b_v, p_proj_weight, p_norm2_weight,
            p_mlp1_weight, p_mlp2_weight, p_slot, started, DTYPE, False, EMBED, EMBED_P, HIDDEN,
            HIDDEN_P, BLOCK_T, True)  # fmt: skip
        started = tl.full((), 1, tl.int32)
        store_rows(p_dy + o_image, b_dy, o_t, m_t, EMBED, EMBED_P)
        store_rows(p_dv + o_image, b_da, o_t, m_t, EMBED, EMBED_P)
        # The next tile adds to what other threads of this one stored.
        tl.debug_barrier()


@triton.jit
def transformer_layer_bwd_split_kernel(
    p_x,
    p_dq,
    p_dk,
    p_dv,
    p_packed,
    p_norm_weight,
    p_scratch,
    p_slots,
    p_grad_x,
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
    items,
    bands,
    rows_per_band,
    slot_size,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NEED_X: tl.constexpr,
):
    """From the gradients of q, k and v those of weight and norm (to the slot) and of the map."""
    COLUMNS: tl.constexpr = 3 * EMBED_P
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * slot_size
    p_tile = p_scratch + tl.program_id(0).to(tl.int64) * (BLOCK_T * COLUMNS)
    o_tile = tl.arange(0, BLOCK_T)[:, None] * COLUMNS + tl.arange(0, EMBED_P)[None, :]
    started = tl.full((), 0, tl.int32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image = (item // bands).to(tl.int64)
        o_image = i_image * rows * columns * EMBED
        first_row, own_row, last_row, first_pixel_row, last_pixel_row = band_limits(
            item % bands, rows_per_band, rows, height, KERNEL, STRIDE, PADDING, NEED_X)  # fmt: skip
        p_image = p_x + i_image * stride_b
        stop = last_row * columns
        for start in tl.range(first_row * columns, stop, BLOCK_T, disable_licm=True):
            o_t = start + tl.arange(0, BLOCK_T)
            m_t = o_t < stop
            m_own = m_t & (o_t >= own_row * columns)
            # Side by side in the program's scratch rows, where they stay in the cache.
            b_dq = load_tokens(p_dq + o_image, o_t, m_t, EMBED, 1, True, EMBED, EMBED_P)
            tl.store(p_tile + o_tile, b_dq)
            b_dk = load_tokens(p_dk + o_image, o_t, m_t, EMBED, 1, True, EMBED, EMBED_P)
            tl.store(p_tile + o_tile + EMBED_P, b_dk)
            b_dv = load_tokens(p_dv + o_image, o_t, m_t, EMBED, 1, True, EMBED, EMBED_P)
            tl.store(p_tile + o_tile + 2 * EMBED_P, b_dv)
            o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
            mean, rstd = patch_statistics(
                p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w, height, width, NORM_EPS,
                CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
            # The rows are read back by other threads than stored them.
            tl.debug_barrier()
            split_backward_tile(
                p_image, p_tile, p_packed, p_norm_weight, p_slot,
                p_grad_x + i_image * grad_x_stride_b, COLUMNS, 1, started, o_y, o_x, m_t, m_own,
                first_pixel_row, last_pixel_row, mean, rstd, stride_c, stride_h, stride_w,
                grad_x_stride_c, grad_x_stride_h, grad_x_stride_w, height, width, CHANNELS, KERNEL,
                FLAT, BLOCK_J, BLOCK_T, COLUMNS, EMBED, EMBED_P, BLOCK_O, True, NEED_X,
            )  # fmt: skip
            started = tl.full((), 1, tl.int32)
            # The next tile adds to what other threads of this one stored.
            tl.debug_barrier()


def _hidden(mlp_weight: Tensor) -> dict:
    return {"HIDDEN": mlp_weight.shape[0], "HIDDEN_P": padded(mlp_weight.shape[0])}


def transformer_layer(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    attn_qkv_weight: Tensor,
    attn_proj_weight: Tensor,
    attn_proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    mlp_fc1_weight: Tensor,
    mlp_fc1_bias: Tensor,
    mlp_fc2_weight: Tensor,
    mlp_fc2_bias: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
) -> tuple[Tensor, ...]:
    check_offsets("transformer_layer", x)
    split, constants = geometry(x, kernel_size, stride, padding)
    batch, tokens, embed = x.shape[0], split.tokens, attn_proj_weight.shape[0]
    out, q, k, v = (x.new_empty((batch, tokens, embed)) for _ in range(4))
    attended = x.new_empty((batch, tokens, embed), dtype=torch.float32)
    maximum, normalizer = (x.new_empty((batch, tokens), dtype=torch.float32) for _ in range(2))
    if batch == 0:
        return out, q, k, attended, maximum, normalizer
    tail = (attn_proj_weight, attn_proj_bias, norm2_weight, norm2_bias)
    tail += (mlp_fc1_weight, mlp_fc1_bias, mlp_fc2_weight, mlp_fc2_bias)
    packed = pack_weight(attn_qkv_weight, 3, padded(embed), constants)
    how = launch(table(x.device).forward, x.dtype, embed)
    tiles = triton.cdiv(tokens, how.block_t)
    with device_guard(x):
        transformer_layer_project_kernel[(batch * tiles,)](
            x,
            packed,
            norm1_weight.contiguous(),
            norm1_bias.contiguous(),
            q,
            k,
            v,
            *split,
            tiles,
            **constants,
            EMBED=embed,
            EMBED_P=padded(embed),
            BLOCK_T=how.block_t,
            num_warps=how.warps,
            num_stages=how.stages,
        )
        tiles, options = launch_tiles(table(x.device).softmax, v)
        transformer_layer_attend_kernel[(batch * tiles,)](
            q,
            k,
            v,
            *(tensor.contiguous() for tensor in tail),
            out,
            attended,
            maximum,
            normalizer,
            tokens,
            tiles,
            scale,
            **_hidden(mlp_fc1_weight),
            **options,
        )
    return out, q, k, attended, maximum, normalizer


def transformer_layer_backward(
    grad: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    attn_qkv_weight: Tensor,
    attn_proj_weight: Tensor,
    attn_proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    mlp_fc1_weight: Tensor,
    mlp_fc1_bias: Tensor,
    mlp_fc2_weight: Tensor,
    mlp_fc2_bias: Tensor,
    q: Tensor,
    k: Tensor,
    attended: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    need_x: bool,
) -> tuple[Tensor, ...]:
    check_offsets("transformer_layer", x, grad)
    split, constants = geometry(x, kernel_size, stride, padding)
    batch, tokens, embed = attended.shape
    norm1_weight, norm1_bias = norm1_weight.contiguous(), norm1_bias.contiguous()
    tail = (attn_proj_weight, attn_proj_bias, norm2_weight, norm2_bias)
    tail += (mlp_fc1_weight, mlp_fc1_bias, mlp_fc2_weight, mlp_fc2_bias)
    tail = tuple(tensor.contiguous() for tensor in tail)
    grad_x = like_map(x).zero_() if need_x else x.new_empty(0)
    packed = pack_weight(attn_qkv_weight, 3, padded(embed), constants)
    constants |= {"EMBED": embed, "EMBED_P": padded(embed)}

    entry = table(x.device)
    how = launch(entry.backward, x.dtype, embed, mlp_fc1_weight.shape[0])
    options = {"BLOCK_T": how.block_t, "num_warps": how.warps, "num_stages": how.stages}
    tiles = triton.cdiv(tokens, how.block_t)
    rows = rows_per_band(split.columns)
    bands = triton.cdiv(split.rows, rows)
    tail_size = tail_slot_size(padded(embed), padded(mlp_fc1_weight.shape[0]))
    slot_size = (packed.shape[0] + 1) * packed.shape[1]
    tail_slots = x.new_empty(
        (slot_count(entry.slots, batch * tiles, tail_size), tail_size), dtype=torch.float32
    )
    slots = x.new_empty(
        (slot_count(entry.slots, batch * bands, slot_size), slot_size), dtype=torch.float32
    )
    if batch == 0:
        tail_slots.zero_()
        slots.zero_()
    else:
        v, dy, dv = (torch.empty_like(q) for _ in range(3))
        with device_guard(x):
            transformer_layer_bwd_tail_kernel[(tail_slots.shape[0],)](
                grad,
                x,
                packed,
                norm1_weight,
                norm1_bias,
                *tail[:-1],
                attended,
                v,
                dy,
                dv,
                tail_slots,
                *grad.stride(),
                *split,
                tiles,
                batch * tiles,
                tail_size,
                **constants,
                **_hidden(mlp_fc1_weight),
                **options,
            )
        dq, dk, dv = attention_backward(dy, q, k, v, attended, maximum, normalizer, scale, dv)
        scratch = x.new_empty((slots.shape[0], how.block_t, packed.shape[1]))
        with device_guard(x):
            transformer_layer_bwd_split_kernel[(slots.shape[0],)](
                x,
                dq,
                dk,
                dv,
                packed,
                norm1_weight,
                scratch,
                slots,
                grad_x,
                *split,
                *(grad_x.stride() if need_x else (0, 0, 0, 0)),
                batch * bands,
                bands,
                rows,
                slot_size,
                **constants,
                BLOCK_O=min(64, output_block(packed.shape[1])),
                NEED_X=need_x,
                **options,
                # Left to itself, the assembler spills to fit one block more.
                maxnreg=255 if x.dtype == torch.float32 else None,
            )
    grad_tail = sum_tail_gradients(tail_slots, tail)
    grad_weight, _, grad_norm_weight, grad_norm_bias = unpack_gradient(
        slots, attn_qkv_weight, packed, norm1_weight, norm1_bias, 3, constants
    )
    return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, *grad_tail


torch.library.impl("t2t_triton::transformer_layer", IMPL_DEVICES)(transformer_layer)
torch.library.impl("t2t_triton::transformer_layer_backward", IMPL_DEVICES)(
    transformer_layer_backward
)
