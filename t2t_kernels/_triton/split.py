"""Patches of a map as tiles of tokens, the weight in their order, and the gradients of both.

A tile's tokens walk over their n = C·k·k elements in blocks of BLOCK_J. With few channels (FLAT) a
block holds consecutive elements in the token's own order (channel, row, column); otherwise it holds
adjacent channels of one tap (row, column), which are adjacent in a channels-last map. The packed
weight has one row per element in that order, and zeros where a block is not full.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import SMALLEST_SIDE, device_guard, dot, load_vector, padded, rounded
from t2t_kernels.arguments import output_size
from t2t_kernels.backends import INTERPRETED

# Elements of a block, and bytes of one tap's: 64 adjacent channels of a half type, 32 of float32.
FLAT_BLOCK, TAP_BYTES = 32, 128
# Rows × columns of the weight that a packing program moves, rows that an unpacking one sums.
PACK_ROWS, PACK_COLUMNS = 64, 32
UNPACK_ROWS = 128 if INTERPRETED else 16


class Split(NamedTuple):
    """Geometry of one soft split, in the order in which every kernel takes it."""

    stride_b: int
    stride_c: int
    stride_h: int
    stride_w: int
    height: int
    width: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def geometry(x: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Split, dict]:
    """The geometry of a call: what varies from map to map, and the kernels' constants."""
    channels, height, width = x.shape[1:]
    rows, columns = output_size(height, width, kernel_size, stride, padding)
    flat = channels < SMALLEST_SIDE
    constants = {
        "CHANNELS": channels,
        "KERNEL": kernel_size,
        "STRIDE": stride,
        "PADDING": padding,
        "FLAT": flat,
        "BLOCK_J": FLAT_BLOCK if flat else min(TAP_BYTES // x.element_size(), padded(channels)),
    }
    return Split(*x.stride(), height, width, rows, columns), constants


def packed_rows(constants: dict) -> int:
    area, block = constants["KERNEL"] ** 2, constants["BLOCK_J"]
    if constants["FLAT"]:
        return triton.cdiv(constants["CHANNELS"] * area, block) * block
    return area * triton.cdiv(constants["CHANNELS"], block) * block


def pack_weight(weight: Tensor, groups: int, outputs_padded: int, constants: dict) -> Tensor:
    """(O, n) as (packed rows, groups · ``outputs_padded``), rows in the blocks' order."""
    outputs = weight.shape[0] // groups
    columns = groups * outputs_padded
    rows = packed_rows(constants)
    packed = weight.new_empty((rows, columns))
    with device_guard(weight):
        pack_weight_kernel[(triton.cdiv(rows, PACK_ROWS), triton.cdiv(columns, PACK_COLUMNS))](
            weight,
            packed,
            *weight.stride(),
            rows,
            columns,
            CHANNELS=constants["CHANNELS"],
            KERNEL=constants["KERNEL"],
            FLAT=constants["FLAT"],
            BLOCK_J=constants["BLOCK_J"],
            OUTPUTS=outputs,
            OUTPUTS_PADDED=outputs_padded,
            ROWS=PACK_ROWS,
            COLUMNS=PACK_COLUMNS,
            num_warps=4,
        )
    return packed


def unpack_gradient(
    slots: Tensor,
    weight: Tensor,
    packed: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    constants: dict,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and norm from the slots' partial sums; without a norm two are empty."""
    outputs = weight.shape[0]
    has_norm = norm_weight is not None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(outputs)
    grad_norm_weight = weight.new_empty(weight.shape[1] if has_norm else 0)
    grad_norm_bias = torch.empty_like(grad_norm_weight)
    with device_guard(weight):
        unpack_gradient_kernel[(triton.cdiv(packed.shape[0], UNPACK_ROWS),)](
            slots,
            packed,
            norm_weight,
            norm_bias,
            grad_weight,
            grad_bias,
            grad_norm_weight,
            grad_norm_bias,
            slots.shape[0],
            packed.shape[0],
            CHANNELS=constants["CHANNELS"],
            KERNEL=constants["KERNEL"],
            FLAT=constants["FLAT"],
            BLOCK_J=constants["BLOCK_J"],
            COLUMNS=packed.shape[1],
            OUTPUTS=outputs // groups,
            OUTPUTS_PADDED=packed.shape[1] // groups,
            HAS_NORM=has_norm,
            ROWS=UNPACK_ROWS,
            BLOCK_O=output_block(packed.shape[1]),
            num_warps=4,
        )
    return grad_weight, grad_bias, grad_norm_weight, grad_norm_bias


def output_block(columns: int) -> int:
    """The largest power of two that divides ``columns``, 128 at most."""
    return min(128, columns & -columns)


def rows_per_band(columns: int) -> int:
    """Rows of tokens whose gradients one program takes at a time: about 512 tokens."""
    return max(1, round(512 / columns))


def slot_count(slots: int, items: int, floats: int) -> int:
    """Programs that share ``items``, each with ``floats`` partial sums of its own: 128 MiB in all."""
    return max(1, min(slots, items, 2**25 // floats))


@triton.jit
def packed_element(o_row, CHANNELS: tl.constexpr, KERNEL: tl.constexpr, FLAT: tl.constexpr,
                   BLOCK_J: tl.constexpr):  # fmt: skip
    """The token's element that a packed row stands for, and whether it stands for one."""
    AREA: tl.constexpr = KERNEL * KERNEL
    if FLAT:
        return o_row, o_row < CHANNELS * AREA
    else:
        PER_TAP: tl.constexpr = (CHANNELS + BLOCK_J - 1) // BLOCK_J * BLOCK_J
        c = o_row % PER_TAP
        return c * AREA + o_row // PER_TAP, (c < CHANNELS) & (o_row < PER_TAP * AREA)


@triton.jit
def pack_weight_kernel(
    p_weight,
    p_packed,
    stride_o,
    stride_j,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j, m_j = packed_element(o_row, CHANNELS, KERNEL, FLAT, BLOCK_J)
    o = o_column // OUTPUTS_PADDED * OUTPUTS + o_column % OUTPUTS_PADDED
    m_o = (o_column % OUTPUTS_PADDED < OUTPUTS) & (o_column < columns)
    p = p_weight + j.to(tl.int64)[:, None] * stride_j + o.to(tl.int64)[None, :] * stride_o
    b = tl.load(p, mask=m_j[:, None] & m_o[None, :], other=0.0)
    p = p_packed + o_row[:, None] * columns + o_column[None, :]
    tl.store(p, b, mask=(o_row < rows)[:, None] & (o_column < columns)[None, :])


@triton.jit
def token_corners(o_t, columns, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """Row and column of the map at which the patches of the tokens ``o_t`` begin."""
    return o_t // columns * STRIDE - PADDING, o_t % columns * STRIDE - PADDING


@triton.jit
def load_patch(
    p_image,
    i_block,
    o_y,
    o_x,
    m_t,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Block ``i_block`` of the patches at (o_y, o_x): float32, zero outside of the map; its mask."""
    AREA: tl.constexpr = KERNEL * KERNEL
    if FLAT:
        o_j = i_block * BLOCK_J + tl.arange(0, BLOCK_J)
        m_j = o_j < CHANNELS * AREA
        y = o_y[:, None] + (o_j % AREA // KERNEL)[None, :]
        x = o_x[:, None] + (o_j % KERNEL)[None, :]
        m = m_t[:, None] & m_j[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        p = p_image + (o_j // AREA * stride_c)[None, :] + y * stride_h + x * stride_w
    else:
        BLOCKS_PER_TAP: tl.constexpr = (CHANNELS + BLOCK_J - 1) // BLOCK_J
        tap = i_block // BLOCKS_PER_TAP
        o_c = i_block % BLOCKS_PER_TAP * BLOCK_J + tl.arange(0, BLOCK_J)
        m_j = o_c < CHANNELS
        y = o_y + tap // KERNEL
        x = o_x + tap % KERNEL
        m_y = m_t & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        m = m_y[:, None] & m_j[None, :]
        p = p_image + (y * stride_h + x * stride_w)[:, None] + (o_c * stride_c)[None, :]
    return tl.load(p, mask=m, other=0.0).to(tl.float32), m_j


@triton.jit
def block_count(CHANNELS: tl.constexpr, KERNEL: tl.constexpr, FLAT: tl.constexpr,
                BLOCK_J: tl.constexpr):  # fmt: skip
    if FLAT:
        return (CHANNELS * KERNEL * KERNEL + BLOCK_J - 1) // BLOCK_J
    else:
        return KERNEL * KERNEL * ((CHANNELS + BLOCK_J - 1) // BLOCK_J)


@triton.jit
def patch_statistics(
    p_image,
    o_y,
    o_x,
    m_t,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    eps,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Mean and 1/√(variance + eps) of each patch, merged block by block; 0 and 0 for no token."""
    mean = o_y.to(tl.float32) * 0.0
    squares = mean
    seen = 0.0
    for i_block in range(0, block_count(CHANNELS, KERNEL, FLAT, BLOCK_J)):
        b_u, m_j = load_patch(p_image, i_block, o_y, o_x, m_t, stride_c, stride_h, stride_w,
                              height, width, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
        count = tl.sum(m_j.to(tl.float32))
        # Divisions rounded as IEEE has it: the mean of equal numbers is that number.
        block_mean = tl.div_rn(tl.sum(b_u, 1), count)
        centred = tl.where(m_j[None, :], b_u - block_mean[:, None], 0.0)
        share = tl.div_rn(count, seen + count)
        shift = block_mean - mean
        mean += shift * share
        squares += tl.sum(centred * centred, 1) + shift * shift * (seen * share)
        seen += count
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, seen) + eps))
    return mean, tl.where(m_t, rstd, 0.0)


@triton.jit
def normalized_patch(
    p_image,
    p_norm_weight,
    p_norm_bias,
    i_block,
    o_y,
    o_x,
    m_t,
    mean,
    rstd,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """A block of what the linear map is applied to."""
    b_u, m_j = load_patch(p_image, i_block, o_y, o_x, m_t, stride_c, stride_h, stride_w, height,
                          width, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
    if HAS_NORM:
        o_row = i_block * BLOCK_J + tl.arange(0, BLOCK_J)
        j, m_j = packed_element(o_row, CHANNELS, KERNEL, FLAT, BLOCK_J)
        gain = tl.load(p_norm_weight + j, mask=m_j, other=0.0).to(tl.float32)
        offset = tl.load(p_norm_bias + j, mask=m_j, other=0.0).to(tl.float32)
        b_u = (b_u - mean[:, None]) * rstd[:, None] * gain[None, :] + offset[None, :]
    return b_u


@triton.jit
def project(
    p_image,
    p_packed,
    p_bias,
    p_norm_weight,
    p_norm_bias,
    o_y,
    o_x,
    m_t,
    mean,
    rstd,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """The three thirds of a tile's outputs, v the last; in place of what is not asked for, v."""
    DTYPE: tl.constexpr = p_image.dtype.element_ty
    o_e = tl.arange(0, EMBED_P)
    b_v = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    if p_bias is not None:
        b_v += load_vector(p_bias + 2 * EMBED, EMBED, EMBED_P)[None, :]
    b_first = b_v
    b_second = b_v
    if FIRST:
        b_first = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
        if p_bias is not None:
            b_first += load_vector(p_bias, EMBED, EMBED_P)[None, :]
    if SECOND:
        b_second = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
        if p_bias is not None:
            b_second += load_vector(p_bias + EMBED, EMBED, EMBED_P)[None, :]
    for i_block in range(0, block_count(CHANNELS, KERNEL, FLAT, BLOCK_J)):
        b_u = normalized_patch(p_image, p_norm_weight, p_norm_bias, i_block, o_y, o_x, m_t, mean,
                               rstd, stride_c, stride_h, stride_w, height, width, CHANNELS, KERNEL,
                               FLAT, BLOCK_J, True)  # fmt: skip
        b_u = rounded(b_u, DTYPE)
        o_j = i_block * BLOCK_J + tl.arange(0, BLOCK_J)
        p_w = p_packed + o_j[:, None] * (3 * EMBED_P) + o_e[None, :]
        if FIRST:
            b_first = dot(b_u, tl.load(p_w), b_first)
        if SECOND:
            b_second = dot(b_u, tl.load(p_w + EMBED_P), b_second)
        b_v = dot(b_u, tl.load(p_w + 2 * EMBED_P), b_v)
    return b_first, b_second, b_v


@triton.jit
def band_limits(i_band, rows_per_band, rows, height, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
                PADDING: tl.constexpr, NEED_X: tl.constexpr):  # fmt: skip
    """Rows of a band: its tokens' first, first own and end; its pixels' first and end."""
    own = i_band * rows_per_band
    end = tl.minimum(own + rows_per_band, rows)
    # Tokens of earlier rows reach down into this band of pixels.
    first = tl.maximum(own - (KERNEL - 1) // STRIDE, 0) if NEED_X else own
    first_pixel_row = tl.maximum(own * STRIDE - PADDING, 0)
    last_pixel_row = tl.where(end == rows, height, tl.minimum(end * STRIDE - PADDING, height))
    return first, own, end, first_pixel_row, last_pixel_row


@triton.jit
def add_to_slot(p, b, started):
    """Add to this program's partial sums; the first tile finds nothing there yet."""
    m = tl.broadcast_to(started, b.shape) > 0
    tl.store(p, tl.load(p, mask=m, other=0.0) + b)


@triton.jit
def split_backward_tile(
    p_image,
    p_grad,
    p_packed,
    p_norm_weight,
    p_slot,
    p_grad_image,
    stride_t,
    stride_o,
    started,
    o_y,
    o_x,
    m_t,
    m_own,
    first_pixel_row,
    last_pixel_row,
    mean,
    rstd,
    stride_c,
    stride_h,
    stride_w,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    height,
    width,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS_PADDED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NEED_X: tl.constexpr,
):
    """A tile's part in the gradients of the weight (to the slot) and of the map (to its band).

    The gradient of the linear map's result is at ``p_grad``, a row per token of the tile. The slot
    holds Σ dy, then Σ û dyᵀ in packed order, û being the patch before the norm's gain and bias.
    Tokens outside of ``m_own`` belong to another band, and reach into this one.
    """
    DTYPE: tl.constexpr = p_image.dtype.element_ty
    AREA: tl.constexpr = KERNEL * KERNEL
    o_row = tl.arange(0, BLOCK_T)
    o_o = tl.arange(0, BLOCK_O)
    for i_o in range(0, COLUMNS // BLOCK_O):
        o = i_o * BLOCK_O + o_o
        m_o = o % OUTPUTS_PADDED < OUTPUTS
        p_dy = p_grad + o_row[:, None] * stride_t + o[None, :] * stride_o
        b_dy = tl.load(p_dy, mask=m_own[:, None] & m_o[None, :], other=0.0)
        add_to_slot(p_slot + o, tl.sum(b_dy.to(tl.float32), 0), started)

    for i_block in range(0, block_count(CHANNELS, KERNEL, FLAT, BLOCK_J)):
        b_u, m_j = load_patch(p_image, i_block, o_y, o_x, m_own, stride_c, stride_h, stride_w,
                              height, width, CHANNELS, KERNEL, FLAT, BLOCK_J)  # fmt: skip
        if HAS_NORM:
            b_u = tl.where(m_j[None, :], (b_u - mean[:, None]) * rstd[:, None], 0.0)
        b_u = tl.trans(rounded(b_u, DTYPE))
        o_j = i_block * BLOCK_J + tl.arange(0, BLOCK_J)
        for i_o in range(0, COLUMNS // BLOCK_O):
            o = i_o * BLOCK_O + o_o
            m_o = o % OUTPUTS_PADDED < OUTPUTS
            p_dy = p_grad + o_row[:, None] * stride_t + o[None, :] * stride_o
            b_dy = tl.load(p_dy, mask=m_own[:, None] & m_o[None, :], other=0.0)
            b_sum = dot(b_u, b_dy, tl.zeros([BLOCK_J, BLOCK_O], tl.float32))
            p = p_slot + (1 + o_j)[:, None] * COLUMNS + o[None, :]
            add_to_slot(p, b_sum, started)

    if NEED_X:
        BLOCK_C: tl.constexpr = 16 if FLAT else BLOCK_J
        BLOCKS_PER_TAP: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
        o_c = tl.arange(0, BLOCK_C)
        mean_g = mean
        mean_gu = mean
        if HAS_NORM:
            # The norm's own gradient: mean of g and of g·û over a token's elements.
            mean_g = mean * 0.0
            mean_gu = mean * 0.0
            for i in range(0, AREA * BLOCKS_PER_TAP):
                b_g = _patch_gradient(p_grad, p_packed, p_norm_weight, i, m_t, stride_t, stride_o,
                                      CHANNELS, KERNEL, FLAT, BLOCK_C, BLOCK_T, COLUMNS, OUTPUTS,
                                      OUTPUTS_PADDED, BLOCK_O, HAS_NORM)  # fmt: skip
                b_u, m_c = load_patch(p_image, i, o_y, o_x, m_t, stride_c, stride_h, stride_w,
                                      height, width, CHANNELS, KERNEL, False, BLOCK_C)  # fmt: skip
                mean_g += tl.sum(b_g, 1)
                mean_gu += tl.sum(b_g * (b_u - mean[:, None]) * rstd[:, None], 1)
            mean_g = mean_g / (CHANNELS * AREA)
            mean_gu = mean_gu / (CHANNELS * AREA)
        for i in range(0, AREA * BLOCKS_PER_TAP):
            b_g = _patch_gradient(p_grad, p_packed, p_norm_weight, i, m_t, stride_t, stride_o,
                                  CHANNELS, KERNEL, FLAT, BLOCK_C, BLOCK_T, COLUMNS, OUTPUTS,
                                  OUTPUTS_PADDED, BLOCK_O, HAS_NORM)  # fmt: skip
            if HAS_NORM:
                b_u, m_c = load_patch(p_image, i, o_y, o_x, m_t, stride_c, stride_h, stride_w,
                                      height, width, CHANNELS, KERNEL, False, BLOCK_C)  # fmt: skip
                b_u = (b_u - mean[:, None]) * rstd[:, None]
                b_g = (b_g - mean_g[:, None] - b_u * mean_gu[:, None]) * rstd[:, None]
            tap = i // BLOCKS_PER_TAP
            c = i % BLOCKS_PER_TAP * BLOCK_C + o_c
            y = o_y + tap // KERNEL
            x = o_x + tap % KERNEL
            m_y = m_t & (y >= first_pixel_row) & (y < last_pixel_row) & (x >= 0) & (x < width)
            m = m_y[:, None] & (c < CHANNELS)[None, :]
            o_pixel = y * grad_stride_h + x * grad_stride_w
            p = p_grad_image + o_pixel[:, None] + (c * grad_stride_c)[None, :]
            b_before = tl.load(p, mask=m, other=0.0).to(tl.float32)
            tl.store(p, rounded(b_before + b_g, DTYPE), mask=m)
            # Another token's thread adds to the same pixel at the next tap.
            tl.debug_barrier()


@triton.jit
def _patch_gradient(
    p_grad,
    p_packed,
    p_norm_weight,
    i_block,
    m_t,
    stride_t,
    stride_o,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS_PADDED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """γ·Wᵀ·dy for the channels of one tap."""
    BLOCKS_PER_TAP: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tap = i_block // BLOCKS_PER_TAP
    c = i_block % BLOCKS_PER_TAP * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = c < CHANNELS
    j = c * (KERNEL * KERNEL) + tap
    if FLAT:
        row = j
    else:
        row = tap * (BLOCKS_PER_TAP * BLOCK_C) + c
    o_row = tl.arange(0, BLOCK_T)
    b_g = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for i_o in range(0, COLUMNS // BLOCK_O):
        o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
        m_o = o % OUTPUTS_PADDED < OUTPUTS
        p_dy = p_grad + o_row[:, None] * stride_t + o[None, :] * stride_o
        b_dy = tl.load(p_dy, mask=m_t[:, None] & m_o[None, :], other=0.0)
        p_w = p_packed + row[None, :] * COLUMNS + o[:, None]
        b_g = dot(b_dy, tl.load(p_w, mask=m_c[None, :] & m_o[:, None], other=0.0), b_g)
    if HAS_NORM:
        b_g *= tl.load(p_norm_weight + j, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_g


@triton.jit
def unpack_gradient_kernel(
    p_slots,
    p_packed,
    p_norm_weight,
    p_norm_bias,
    p_grad_weight,
    p_grad_bias,
    p_grad_norm_weight,
    p_grad_norm_bias,
    slots,
    rows,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS_PADDED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    WIDTH: tl.constexpr = CHANNELS * KERNEL * KERNEL
    DTYPE: tl.constexpr = p_packed.dtype.element_ty
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j, m_j = packed_element(o_row, CHANNELS, KERNEL, FLAT, BLOCK_J)
    slot_size = (rows + 1).to(tl.int64) * COLUMNS
    if HAS_NORM:
        gain = tl.load(p_norm_weight + j, mask=m_j, other=0.0).to(tl.float32)
        offset = tl.load(p_norm_bias + j, mask=m_j, other=0.0).to(tl.float32)
        b_gain = tl.zeros([ROWS], tl.float32)
        b_offset = tl.zeros([ROWS], tl.float32)
    for i_o in range(0, COLUMNS // BLOCK_O):
        o_column = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
        m_o = o_column % OUTPUTS_PADDED < OUTPUTS
        o = o_column // OUTPUTS_PADDED * OUTPUTS + o_column % OUTPUTS_PADDED
        m = m_j[:, None] & m_o[None, :]
        b_sum = tl.zeros([ROWS, BLOCK_O], tl.float32)
        b_bias = tl.zeros([BLOCK_O], tl.float32)
        o_sum = (1 + o_row)[:, None] * COLUMNS + o_column[None, :]
        for i_slot in range(0, slots):
            p_slot = p_slots + i_slot * slot_size
            b_sum += tl.load(p_slot + o_sum, mask=m, other=0.0)
            b_bias += tl.load(p_slot + o_column, mask=m_o, other=0.0)
        if HAS_NORM:
            p_w = p_packed + o_row[:, None] * COLUMNS + o_column[None, :]
            b_w = tl.load(p_w, mask=m, other=0.0).to(tl.float32)
            b_gain += tl.sum(b_w * b_sum, 1)
            b_offset += tl.sum(b_w * b_bias[None, :], 1)
            b_sum = b_sum * gain[:, None] + b_bias[None, :] * offset[:, None]
        tl.store(p_grad_weight + o[None, :] * WIDTH + j[:, None], rounded(b_sum, DTYPE), mask=m)
        if tl.program_id(0) == 0:
            tl.store(p_grad_bias + o, rounded(b_bias, DTYPE), mask=m_o)
    if HAS_NORM:
        tl.store(p_grad_norm_weight + j, rounded(b_gain, DTYPE), mask=m_j)
        tl.store(p_grad_norm_bias + j, rounded(b_offset, DTYPE), mask=m_j)
