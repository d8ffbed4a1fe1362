"""Soft split, LayerNorm and Linear in Triton: an implicit matrix product over patches.

Forward, a program makes BLOCK_O outputs of BLOCK_T tokens: one walk over their patches for the
norm's statistics, one for the product. Backward, see ``split_backward_tile``.
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
    rounded,
    table,
)
from t2t_kernels._triton.split import (
    band_limits,
    block_count,
    geometry,
    normalized_patch,
    output_block,
    pack_weight,
    patch_statistics,
    rows_per_band,
    slot_count,
    split_backward_tile,
    token_corners,
    unpack_gradient,
)
from t2t_kernels.soft_split_linear.ops import like_map


@triton.jit
def soft_split_linear_fwd_kernel(
    p_x,
    p_packed,
    p_bias,
    p_norm_weight,
    p_norm_bias,
    p_y,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    rows,
    columns,
    tiles,
    eps,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t = o_t < rows * columns
    m_o = o_o < OUTPUTS
    o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
    p_image = p_x + i_image * stride_b

    mean = o_y.to(tl.float32)
    rstd = mean
    if HAS_NORM:
        mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w, height,
                                      width, eps, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
    b_y = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for i_block in range(0, block_count(CHANNELS, KERNEL, FLAT, BLOCK_J)):
        b_u = normalized_patch(p_image, p_norm_weight, p_norm_bias, i_block, o_y, o_x, m_t, mean,
                               rstd, stride_c, stride_h, stride_w, height, width, CHANNELS, KERNEL,
                               FLAT, BLOCK_J, HAS_NORM)  # fmt: skip
        o_j = i_block * BLOCK_J + tl.arange(0, BLOCK_J)
        b_w = tl.load(p_packed + o_j[:, None] * COLUMNS + o_o[None, :])
        b_y = dot(rounded(b_u, DTYPE), b_w, b_y)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    p = p_y + (i_image * rows * columns + o_t)[:, None] * OUTPUTS + o_o[None, :]
    tl.store(p, rounded(b_y, DTYPE), mask=m_t[:, None] & m_o[None, :])


@triton.jit
def soft_split_linear_bwd_kernel(
    p_x,
    p_grad,
    p_packed,
    p_norm_weight,
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
    grad_stride_b,
    grad_stride_t,
    grad_stride_o,
    grad_x_stride_b,
    grad_x_stride_c,
    grad_x_stride_h,
    grad_x_stride_w,
    items,
    bands,
    rows_per_band,
    slot_size,
    eps,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NEED_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * slot_size
    started = tl.full((), 0, tl.int32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image = (item // bands).to(tl.int64)
        first_row, own_row, last_row, first_pixel_row, last_pixel_row = band_limits(
            item % bands, rows_per_band, rows, height, KERNEL, STRIDE, PADDING, NEED_X)  # fmt: skip
        p_image = p_x + i_image * stride_b
        stop = last_row * columns
        for start in tl.range(first_row * columns, stop, BLOCK_T, disable_licm=True):
            o_t = start + tl.arange(0, BLOCK_T)
            m_t = o_t < stop
            m_own = m_t & (o_t >= own_row * columns)
            o_y, o_x = token_corners(o_t, columns, STRIDE, PADDING)
            mean = o_y.to(tl.float32)
            rstd = mean
            if HAS_NORM:
                mean, rstd = patch_statistics(p_image, o_y, o_x, m_t, stride_c, stride_h, stride_w,
                                              height, width, eps, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
            split_backward_tile(
                p_image, p_grad + i_image * grad_stride_b + start * grad_stride_t,
                p_packed, p_norm_weight, p_slot, p_grad_x + i_image * grad_x_stride_b,
                grad_stride_t, grad_stride_o, started, o_y, o_x, m_t, m_own, first_pixel_row,
                last_pixel_row, mean, rstd, stride_c, stride_h, stride_w, grad_x_stride_c,
                grad_x_stride_h, grad_x_stride_w, height, width, CHANNELS, KERNEL, FLAT, BLOCK_J,
                BLOCK_T, COLUMNS, OUTPUTS, COLUMNS, BLOCK_O, HAS_NORM, NEED_X,
            )  # fmt: skip
            started = tl.full((), 1, tl.int32)
            # The next tile adds to what other threads of this one stored.
            tl.debug_barrier()


def soft_split_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    check_offsets("soft_split_linear", x)
    split, constants = geometry(x, kernel_size, stride, padding)
    outputs = weight.shape[0]
    y = x.new_empty((x.shape[0], split.tokens, outputs))
    if y.numel() == 0:
        return y
    packed = pack_weight(weight, 1, _padded_outputs(outputs), constants)
    how = launch(table(x.device).forward, x.dtype, 64)
    tiles, block_o = triton.cdiv(split.tokens, how.block_t), min(128, output_block(packed.shape[1]))
    with device_guard(x):
        soft_split_linear_fwd_kernel[(x.shape[0] * tiles, packed.shape[1] // block_o)](
            x,
            packed,
            *(_contiguous(tensor) for tensor in (bias, norm_weight, norm_bias)),
            y,
            *split,
            tiles,
            eps,
            **constants,
            COLUMNS=packed.shape[1],
            OUTPUTS=outputs,
            HAS_BIAS=bias is not None,
            HAS_NORM=norm_weight is not None,
            BLOCK_T=how.block_t,
            BLOCK_O=block_o,
            num_warps=how.warps,
            num_stages=how.stages,
            # Left to itself, the assembler spills to fit one block more.
            maxnreg=255 if x.dtype == torch.float32 else None,
        )
    return y


def soft_split_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_offsets("soft_split_linear", x, grad)
    split, constants = geometry(x, kernel_size, stride, padding)
    outputs = weight.shape[0]
    norm_weight, norm_bias = _contiguous(norm_weight), _contiguous(norm_bias)
    packed = pack_weight(weight, 1, _padded_outputs(outputs), constants)
    grad_x = like_map(x).zero_() if need_x else x.new_empty(0)

    rows = rows_per_band(split.columns)
    bands = triton.cdiv(split.rows, rows)
    items, slot_size = x.shape[0] * bands, (packed.shape[0] + 1) * packed.shape[1]
    entry = table(x.device)
    how = launch(entry.backward, x.dtype, 64)
    slots = x.new_empty((slot_count(entry.slots, items, slot_size), slot_size), dtype=torch.float32)
    if items == 0:
        slots.zero_()
    else:
        with device_guard(x):
            soft_split_linear_bwd_kernel[(slots.shape[0],)](
                x,
                grad,
                packed,
                norm_weight,
                slots,
                grad_x,
                *split,
                *grad.stride(),
                *(grad_x.stride() if need_x else (0, 0, 0, 0)),
                items,
                bands,
                rows,
                slot_size,
                eps,
                **constants,
                COLUMNS=packed.shape[1],
                OUTPUTS=outputs,
                HAS_NORM=norm_weight is not None,
                NEED_X=need_x,
                BLOCK_T=how.block_t,
                BLOCK_O=min(64, output_block(packed.shape[1])),
                num_warps=how.warps,
                num_stages=how.stages,
                # As above, whatever the dtype.
                maxnreg=255,
            )
    grads = unpack_gradient(slots, weight, packed, norm_weight, norm_bias, 1, constants)
    return grad_x, *grads


def _padded_outputs(outputs: int) -> int:
    return padded(outputs) if outputs <= 64 else triton.cdiv(outputs, 64) * 64


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


torch.library.impl("t2t_triton::soft_split_linear", IMPL_DEVICES)(soft_split_linear)
torch.library.impl("t2t_triton::soft_split_linear_backward", IMPL_DEVICES)(
    soft_split_linear_backward
)
