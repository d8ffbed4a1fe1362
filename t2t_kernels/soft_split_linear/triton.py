"""Soft split, LayerNorm and Linear in Triton: implicit matrix products over patches.

The norm's gain and offset are folded into the weight, W∘γ, and the bias, c = Wβ + b. A walk over the patches
then gives, with d the deviations from an element of the patch, s the row sums of the weight and r = 1/σ,

    y = r (W∘γ · d − mean(d) s) + c,

and mean and variance besides. Backward, from y again: the weight's gradient Σ dy ûᵀ, kept in registers over
many tokens, and the map's, a product per tap for each class of pixels that the same taps reach.

A walk takes BLOCK_J elements of a patch at a time. With 16 channels or more they are adjacent channels of a
tap (row, column); with fewer (the image) they are in the order (channel, row, column), columns padded to a
power of two. The packed weight has a row per element in that order, zeros where there is none.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    IMPL_DEVICES,
    SMALLEST_SIDE,
    check_offsets,
    device_guard,
    dot,
    launch,
    padded,
    rounded,
    slot_count,
    sum_slots,
    table,
)
from t2t_kernels.arguments import output_size
from t2t_kernels.soft_split_linear.ops import like_map

# Rows and columns of the packed weight that a program of fold_kernel, and of unfold_kernel, takes at a time.
_FOLD_ROWS, _FOLD_COLUMNS = 128, 16
# A row that lies outside of every map.
_FAR = tl.constexpr(-(2**30))


@dataclass(frozen=True)
class Split:
    """Geometry of a soft split and of the products with its patches."""

    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    rows: int
    columns: int
    # Of the map and of its gradient: batch, channel, row, column.
    strides: tuple[int, int, int, int]
    grad_strides: tuple[int, int, int, int]
    outputs: int
    # Elements of a patch at a time.
    block_j: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def elements(self) -> int:
        return self.channels * self.kernel**2

    @property
    def flat(self) -> bool:
        """(channel, row, column) rather than (tap, channel)."""
        return self.channels < SMALLEST_SIDE

    @property
    def kernel_p(self) -> int:
        return triton.next_power_of_2(self.kernel)

    @property
    def blocks_per_tap(self) -> int:
        return triton.cdiv(self.channels, self.block_j)

    @property
    def blocks(self) -> int:
        if self.flat:
            return triton.cdiv(self.channels * self.kernel * self.kernel_p, self.block_j)
        return self.kernel**2 * self.blocks_per_tap

    @property
    def packed_rows(self) -> int:
        return self.blocks * self.block_j

    @property
    def block_o(self) -> int:
        """Outputs of one product."""
        return min(64, padded(self.outputs))

    @property
    def packed_columns(self) -> int:
        return triton.cdiv(self.outputs, self.block_o) * self.block_o

    @property
    def parts(self) -> int:
        """Products of one program, so that it gathers its patches once for up to 192 outputs."""
        products = self.packed_columns // self.block_o
        return max(count for count in (1, 2, 3) if products % count == 0)

    @property
    def groups(self) -> int:
        """Programs that share a tile's outputs."""
        return self.packed_columns // self.block_o // self.parts


def split_of(
    x: Tensor, outputs: int, kernel_size: int, stride: int, padding: int, grad_x=None
) -> Split:
    channels, height, width = x.shape[1:]
    rows, columns = output_size(height, width, kernel_size, stride, padding)
    block_j = 128 // x.element_size()
    return Split(
        channels,
        height,
        width,
        kernel_size,
        stride,
        padding,
        rows,
        columns,
        x.stride(),
        x.stride() if grad_x is None else grad_x.stride(),
        outputs,
        block_j if channels < SMALLEST_SIDE else min(block_j, padded(channels)),
    )


@triton.jit
def _element(o_row, S: tl.constexpr):
    """The patch's element that a packed row stands for, and whether it stands for one."""
    if S.flat:
        kx = o_row % S.kernel_p
        row = o_row // S.kernel_p
        return row * S.kernel + kx, (kx < S.kernel) & (row < S.channels * S.kernel)
    else:
        PER_TAP: tl.constexpr = S.blocks_per_tap * S.block_j
        AREA: tl.constexpr = S.kernel * S.kernel
        c = o_row % PER_TAP
        return c * AREA + o_row // PER_TAP, (c < S.channels) & (o_row < PER_TAP * AREA)


@triton.jit
def fold_kernel(
    p_weight,  # (O, n)
    p_bias,  # (O,) or None
    p_norm_weight,  # (n,) or None
    p_norm_bias,  # (n,) or None
    p_packed,  # (packed rows, packed columns): W∘γ, or W in float32
    p_row_sums,  # (packed columns,) float32: of W∘γ as it was rounded
    p_offset,  # (2, packed columns) float32: Wβ + b, then b
    S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = p_packed.dtype.element_ty
    PACKED_ROWS: tl.constexpr = S.packed_rows
    o_o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_o = o_o < S.outputs
    row_sums = tl.zeros([COLUMNS], tl.float32)
    offset = tl.zeros([COLUMNS], tl.float32)
    if p_bias is not None:
        offset += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_offset + S.packed_columns + o_o, offset, mask=o_o < S.packed_columns)
    for first in range(0, PACKED_ROWS, ROWS):
        o_row = first + tl.arange(0, ROWS)
        j, m_j = _element(o_row, S)
        m = m_j[:, None] & m_o[None, :]
        b_w = tl.load(p_weight + o_o[None, :] * S.elements + j[:, None], mask=m, other=0.0)
        b_w = b_w.to(tl.float32)
        if p_norm_weight is not None:
            shift = tl.load(p_norm_bias + j, mask=m_j, other=0.0).to(tl.float32)
            offset += tl.sum(b_w * shift[:, None], 0)
            b_folded = b_w * tl.load(p_norm_weight + j, mask=m_j, other=0.0).to(tl.float32)[:, None]
        else:
            b_folded = b_w
        if DTYPE != tl.float32:
            b_w = rounded(b_folded, DTYPE)
            b_folded = b_w.to(tl.float32)
        row_sums += tl.sum(b_folded, 0)
        p = p_packed + o_row[:, None] * S.packed_columns + o_o[None, :]
        tl.store(p, b_w, mask=(o_row < PACKED_ROWS)[:, None] & (o_o < S.packed_columns)[None, :])
    tl.store(p_row_sums + o_o, row_sums, mask=o_o < S.packed_columns)
    tl.store(p_offset + o_o, offset, mask=o_o < S.packed_columns)


@triton.jit
def _corners(o_t, S: tl.constexpr):
    """Row and column of the map at which the patches of the tokens ``o_t`` begin."""
    o_y = o_t // S.columns * S.stride - S.padding
    return tl.where(o_t < S.tokens, o_y, _FAR), o_t % S.columns * S.stride - S.padding


@triton.jit
def _load_tap(p_image, o_y, o_x, ky, kx, first, WIDTH: tl.constexpr, S: tl.constexpr):
    """WIDTH channels from ``first`` on of the tap (ky, kx) of the patches at (o_y, o_x), zero outside of the map."""
    o_c = first + tl.arange(0, WIDTH)
    y = o_y + ky
    x = o_x + kx
    m_t = (y >= 0) & (y < S.height) & (x >= 0) & (x < S.width)
    p = p_image + (y * S.strides[2] + x * S.strides[3])[:, None] + (o_c * S.strides[1])[None, :]
    if S.channels % WIDTH == 0:
        return tl.load(p, mask=m_t[:, None], other=0.0)
    else:
        return tl.load(p, mask=m_t[:, None] & (o_c < S.channels)[None, :], other=0.0)


@triton.jit
def _load_patch(p_image, i_block, o_y, o_x, S: tl.constexpr):
    """Block ``i_block`` of the patches at (o_y, o_x)."""
    if S.flat:
        o_row = i_block * S.block_j + tl.arange(0, S.block_j)
        kx = o_row % S.kernel_p
        row = o_row // S.kernel_p
        ky = row % S.kernel
        c = row // S.kernel
        offset = c * S.strides[1] + ky * S.strides[2] + kx * S.strides[3]
        ky = tl.where((kx < S.kernel) & (c < S.channels), ky, _FAR)
        y = o_y[:, None] + ky[None, :]
        x = o_x[:, None] + kx[None, :]
        m = (y >= 0) & (y < S.height) & (x >= 0) & (x < S.width)
        corner = o_y * S.strides[2] + o_x * S.strides[3]
        return tl.load(p_image + (corner[:, None] + offset[None, :]), mask=m, other=0.0)
    else:
        tap = i_block // S.blocks_per_tap
        first = i_block % S.blocks_per_tap * S.block_j
        return _load_tap(p_image, o_y, o_x, tap // S.kernel, tap % S.kernel, first, S.block_j, S)


@triton.jit
def _deviation(b_u, reference, i_block, S: tl.constexpr):
    """Patches minus a number each, 0 for what is no element of a patch."""
    b_d = b_u.to(tl.float32) - reference[:, None]
    if S.flat or S.channels % S.block_j != 0:
        j, m_j = _element(i_block * S.block_j + tl.arange(0, S.block_j), S)
        b_d = tl.where(m_j[None, :], b_d, 0.0)
    return b_d


@triton.jit
def _reference(p_image, o_y, o_x, S: tl.constexpr):
    """The mean over the channels, or the first 64, of the patches' central pixels; of equal numbers that number."""
    WIDTH: tl.constexpr = 16 if S.flat else S.block_j
    COUNT: tl.constexpr = min(WIDTH, S.channels)
    o_c = tl.arange(0, WIDTH)
    b = _load_tap(p_image, o_y, o_x, S.kernel // 2, S.kernel // 2, 0, WIDTH, S).to(tl.float32)
    first = tl.sum(tl.where((o_c == 0)[None, :], b, 0.0), 1)
    return first + tl.sum(tl.where((o_c < COUNT)[None, :], b - first[:, None], 0.0), 1) / COUNT


@triton.jit
def _moments(total, squares, eps, S: tl.constexpr):
    """Mean, and 1/√(variance + eps), from the sums of deviations and of their squares."""
    mean = total / S.elements
    variance = tl.maximum(
        squares / S.elements - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL
    )
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def project_kernel(
    p_x,  # (B, C, H, W)
    p_packed,  # (packed rows, packed columns)
    p_row_sums,  # (packed columns,) float32
    p_offset,  # (2, packed columns) float32
    p_norm_weight,  # (n,) or None
    p_norm_bias,  # (n,) or None
    p_y,  # (B, T, O)
    p_statistics,  # (2, B·T) float32, mean and 1/σ, or None
    eps,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """S.parts products of S.block_o outputs for a tile of tokens."""
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    BLOCK_O: tl.constexpr = S.block_o
    TILES: tl.constexpr = (S.tokens + BLOCK_T - 1) // BLOCK_T
    i_image = (tl.program_id(0) // TILES).to(tl.int64)
    o_t = tl.program_id(0) % TILES * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = tl.program_id(1) * (S.parts * BLOCK_O) + tl.arange(0, BLOCK_O)
    o_y, o_x = _corners(o_t, S)
    p_image = p_x + i_image * S.strides[0]
    total = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    # Half types: one walk, and the norm in the epilogue. float32 loses less if patches are normalised.
    HAS_NORM: tl.constexpr = p_norm_weight is not None
    EPILOGUE: tl.constexpr = HAS_NORM and DTYPE != tl.float32
    if HAS_NORM:
        reference = _reference(p_image, o_y, o_x, S)
        if not EPILOGUE:
            for i in range(0, S.blocks):
                b_d = _deviation(_load_patch(p_image, i, o_y, o_x, S), reference, i, S)
                total += tl.sum(b_d, 1)
            reference += tl.div_rn(total, S.elements * 1.0)
            for i in range(0, S.blocks):
                b_d = _deviation(_load_patch(p_image, i, o_y, o_x, S), reference, i, S)
                squares += tl.sum(b_d * b_d, 1)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, S.elements * 1.0) + eps))
    b_0 = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    b_1 = b_0
    b_2 = b_0
    for i in range(0, S.blocks):
        b_u = _load_patch(p_image, i, o_y, o_x, S)
        if EPILOGUE:
            b_u = rounded(_deviation(b_u, reference, i, S), DTYPE)
            b_d = b_u.to(tl.float32)
            total += tl.sum(b_d, 1)
            squares += tl.sum(b_d * b_d, 1)
        elif HAS_NORM:
            j, m_j = _element(i * S.block_j + tl.arange(0, S.block_j), S)
            gain = tl.load(p_norm_weight + j, mask=m_j, other=0.0)
            shift = tl.load(p_norm_bias + j, mask=m_j, other=0.0)
            b_u = _deviation(b_u, reference, i, S) * rstd[:, None] * gain[None, :] + shift[None, :]
        o_j = i * S.block_j + tl.arange(0, S.block_j)
        p_w = p_packed + o_j[:, None] * S.packed_columns + o_o[None, :]
        b_0 = dot(b_u, tl.load(p_w), b_0)
        if S.parts > 1:
            b_1 = dot(b_u, tl.load(p_w + BLOCK_O), b_1)
        if S.parts > 2:
            b_2 = dot(b_u, tl.load(p_w + 2 * BLOCK_O), b_2)
    if EPILOGUE:
        mean, rstd = _moments(total, squares, eps, S)
        reference += mean
    else:
        mean = total
        if not HAS_NORM:
            rstd = total
    if p_statistics is not None:
        p = p_statistics + i_image * S.tokens + o_t
        tl.store(p, reference, mask=o_t < S.tokens)
        p += tl.num_programs(0).to(tl.int64) // TILES * S.tokens
        tl.store(p, rstd, mask=o_t < S.tokens)
    p_rows = p_y + i_image * (S.tokens * S.outputs) + o_t[:, None] * S.outputs
    _store_outputs(p_rows, b_0, mean, rstd, p_row_sums, p_offset, o_t, o_o, S, EPILOGUE)
    if S.parts > 1:
        _store_outputs(
            p_rows, b_1, mean, rstd, p_row_sums, p_offset, o_t, o_o + BLOCK_O, S, EPILOGUE
        )
    if S.parts > 2:
        _store_outputs(
            p_rows, b_2, mean, rstd, p_row_sums, p_offset, o_t, o_o + 2 * BLOCK_O, S, EPILOGUE
        )


@triton.jit
def _store_outputs(
    p_rows, b_y, mean, rstd, p_row_sums, p_offset, o_t, o_o, S: tl.constexpr, EPILOGUE: tl.constexpr
):
    if EPILOGUE:
        b_offset = tl.load(p_offset + o_o)[None, :]
        b_offset -= (rstd * mean)[:, None] * tl.load(p_row_sums + o_o)[None, :]
        b_y = b_y * rstd[:, None] + b_offset
    else:
        b_y += tl.load(p_offset + S.packed_columns + o_o)[None, :]
    m = (o_t < S.tokens)[:, None] & (o_o < S.outputs)[None, :]
    tl.store(p_rows + o_o[None, :], rounded(b_y, p_rows.dtype.element_ty), mask=m)


@triton.jit
def weight_gradient_kernel(
    p_x,  # (B, C, H, W)
    p_dy,  # (B, T, O)
    p_statistics,  # (2, B·T) float32 or None
    p_slots,  # (slots, 1 + packed rows, packed columns) float32
    batch,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Σ dy (row 0) and Σ û dyᵀ over a program's share of the tokens, for a block of the patch's elements."""
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    BLOCK_O: tl.constexpr = S.block_o
    COLUMNS: tl.constexpr = S.packed_columns
    TILES: tl.constexpr = (S.tokens + BLOCK_T - 1) // BLOCK_T
    i_block = tl.program_id(1)
    o_o = tl.program_id(2) * (S.parts * BLOCK_O) + tl.arange(0, BLOCK_O)
    b_0 = tl.zeros([tl.constexpr(S.block_j), BLOCK_O], tl.float32)
    b_1 = b_0
    b_2 = b_0
    sum_0 = tl.zeros([BLOCK_O], tl.float32)
    sum_1 = sum_0
    sum_2 = sum_0
    zero = tl.zeros((), tl.int64)
    for item in tl.range(tl.program_id(0), batch * TILES, tl.num_programs(0), disable_licm=True):
        i_image = zero + item // TILES
        o_t = item % TILES * BLOCK_T + tl.arange(0, BLOCK_T)
        o_y, o_x = _corners(o_t, S)
        b_u = _load_patch(p_x + i_image * S.strides[0], i_block, o_y, o_x, S)
        if p_statistics is not None:
            p = p_statistics + i_image * S.tokens + o_t
            mean = tl.load(p, mask=o_t < S.tokens, other=0.0)
            rstd = tl.load(p + (zero + batch) * S.tokens, mask=o_t < S.tokens, other=0.0)
            b_u = rounded(_deviation(b_u, mean, i_block, S) * rstd[:, None], DTYPE)
        b_u = tl.trans(b_u)
        p_rows = p_dy + i_image * (S.tokens * S.outputs) + o_t[:, None] * S.outputs
        b_0, sum_0 = _add_outputs(p_rows, b_u, b_0, sum_0, i_block, o_t, o_o, S)
        if S.parts > 1:
            b_1, sum_1 = _add_outputs(p_rows, b_u, b_1, sum_1, i_block, o_t, o_o + BLOCK_O, S)
        if S.parts > 2:
            b_2, sum_2 = _add_outputs(p_rows, b_u, b_2, sum_2, i_block, o_t, o_o + 2 * BLOCK_O, S)
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * ((1 + S.packed_rows) * COLUMNS)
    o_j = 1 + i_block * S.block_j + tl.arange(0, S.block_j)
    p = p_slot + o_j[:, None] * COLUMNS + o_o[None, :]
    tl.store(p, b_0)
    if S.parts > 1:
        tl.store(p + BLOCK_O, b_1)
    if S.parts > 2:
        tl.store(p + 2 * BLOCK_O, b_2)
    if i_block == 0:
        tl.store(p_slot + o_o, sum_0)
        if S.parts > 1:
            tl.store(p_slot + o_o + BLOCK_O, sum_1)
        if S.parts > 2:
            tl.store(p_slot + o_o + 2 * BLOCK_O, sum_2)


@triton.jit
def _add_outputs(p_rows, b_u, acc, sums, i_block, o_t, o_o, S: tl.constexpr):
    m = (o_t < S.tokens)[:, None] & (o_o < S.outputs)[None, :]
    b_dy = tl.load(p_rows + o_o[None, :], mask=m, other=0.0)
    if i_block == 0:
        sums += tl.sum(b_dy.to(tl.float32), 0)
    return dot(b_u, b_dy, acc), sums


@triton.jit
def unfold_kernel(
    p_sums,  # (1 + packed rows, packed columns) float32: Σ dy, then Σ û dyᵀ
    p_weight,  # (O, n)
    p_norm_weight,  # (n,) or None
    p_norm_bias,  # (n,) or None
    p_grad_weight,  # (O, n)
    p_grad_bias,  # (O,)
    p_grad_norm_weight,  # (n,) or (0,)
    p_grad_norm_bias,  # (n,) or (0,)
    S: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of the parameters, for ROWS of the patch's elements."""
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    BLOCK_O: tl.constexpr = S.block_o
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j, m_j = _element(o_row, S)
    b_gain = tl.zeros([ROWS], tl.float32)
    b_shift = tl.zeros([ROWS], tl.float32)
    for first in range(0, S.packed_columns, BLOCK_O):
        o_o = first + tl.arange(0, BLOCK_O)
        m_o = o_o < S.outputs
        m = m_j[:, None] & m_o[None, :]
        p = p_sums + (1 + o_row)[:, None] * S.packed_columns + o_o[None, :]
        b_sum = tl.load(p, mask=m, other=0.0)
        b_bias = tl.load(p_sums + o_o, mask=m_o, other=0.0)
        o = o_o[None, :] * S.elements + j[:, None]
        if p_norm_weight is not None:
            b_w = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
            b_gain += tl.sum(b_w * b_sum, 1)
            b_shift += tl.sum(b_w * b_bias[None, :], 1)
            gain = tl.load(p_norm_weight + j, mask=m_j, other=0.0).to(tl.float32)
            shift = tl.load(p_norm_bias + j, mask=m_j, other=0.0).to(tl.float32)
            b_sum = b_sum * gain[:, None] + b_bias[None, :] * shift[:, None]
        tl.store(p_grad_weight + o, rounded(b_sum, DTYPE), mask=m)
        if tl.program_id(0) == 0:
            tl.store(p_grad_bias + o_o, rounded(b_bias, DTYPE), mask=m_o)
    if p_norm_weight is not None:
        tl.store(p_grad_norm_weight + j, rounded(b_gain, DTYPE), mask=m_j)
        tl.store(p_grad_norm_bias + j, rounded(b_shift, DTYPE), mask=m_j)


@triton.jit
def token_scalars_kernel(
    p_dy,  # (B·T, O)
    p_y,  # (B·T, O)
    p_statistics,  # (2, B·T) float32
    p_row_sums,  # (packed columns,) float32
    p_offset,  # (2, packed columns) float32
    p_scalars,  # (2, B·T) float32
    count,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The norm's own gradient: r·mean(dy·s) and r²·mean(dy·(y − c)) of each token."""
    BLOCK_O: tl.constexpr = S.block_o
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < count
    first_mean = tl.zeros([BLOCK_T], tl.float32)
    second_mean = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, S.packed_columns, BLOCK_O):
        o_o = first + tl.arange(0, BLOCK_O)
        o = o_t[:, None] * S.outputs + o_o[None, :]
        m = m_t[:, None] & (o_o < S.outputs)[None, :]
        b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
        first_mean += tl.sum(b_dy * tl.load(p_row_sums + o_o)[None, :], 1)
        second_mean += tl.sum(b_dy * (b_y - tl.load(p_offset + o_o)[None, :]), 1)
    rstd = tl.load(p_statistics + count + o_t, mask=m_t, other=0.0)
    tl.store(p_scalars + o_t, first_mean * rstd / S.elements, mask=m_t)
    tl.store(p_scalars + count + o_t, second_mean * rstd * rstd / S.elements, mask=m_t)


@triton.jit
def map_gradient_kernel(
    p_dy,  # (B, T, O)
    p_packed,  # (packed rows, packed columns)
    p_norm_weight,  # (n,) or None
    p_x,  # (B, C, H, W)
    p_statistics,  # (2, B·T) float32 or None
    p_scalars,  # (2, B·T) float32 or None
    p_grad_x,  # (B, C, H, W)
    count,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_T pixels that the same taps reach: those of one remainder of row and column by the stride."""
    DTYPE: tl.constexpr = p_grad_x.dtype.element_ty
    BLOCK_O: tl.constexpr = S.block_o
    WIDTH: tl.constexpr = (S.width + S.stride - 1) // S.stride
    TILES: tl.constexpr = ((S.height + S.stride - 1) // S.stride * WIDTH + BLOCK_T - 1) // BLOCK_T
    i_image = (tl.program_id(0) // TILES).to(tl.int64)
    o_p = tl.program_id(0) % TILES * BLOCK_T + tl.arange(0, BLOCK_T)
    # The class's first tap, and its first pixel.
    first_ky = tl.program_id(1) // S.stride
    first_kx = tl.program_id(1) % S.stride
    # −padding modulo the stride, and positive.
    LIFT: tl.constexpr = (S.padding // S.stride + 1) * S.stride - S.padding
    y = o_p // WIDTH * S.stride + (first_ky + LIFT) % S.stride
    x = o_p % WIDTH * S.stride + (first_kx + LIFT) % S.stride
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = ((y < S.height) & (x < S.width))[:, None] & (o_c < S.channels)[None, :]
    if p_statistics is not None:
        o = (y * S.strides[2] + x * S.strides[3])[:, None] + (o_c * S.strides[1])[None, :]
        b_x = tl.load(p_x + i_image * S.strides[0] + o, mask=m, other=0.0).to(tl.float32)
    p_dy += i_image * (S.tokens * S.outputs)
    b_dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for ky in range(first_ky, S.kernel, S.stride):
        row = (y + S.padding - ky) // S.stride
        for kx in range(first_kx, S.kernel, S.stride):
            column = (x + S.padding - kx) // S.stride
            m_t = (
                (y + S.padding >= ky)
                & (row < S.rows)
                & (x + S.padding >= kx)
                & (column < S.columns)
            )
            token = row * S.columns + column
            if S.flat:
                o_row = (o_c * S.kernel + ky) * S.kernel_p + kx
            else:
                o_row = (ky * S.kernel + kx) * (S.blocks_per_tap * S.block_j) + o_c
            b_tap = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
            for first in range(0, S.packed_columns, BLOCK_O):
                o_o = first + tl.arange(0, BLOCK_O)
                m_dy = m_t[:, None]
                if S.packed_columns != S.outputs:
                    m_dy = m_dy & (o_o < S.outputs)[None, :]
                b_dy = tl.load(
                    p_dy + token[:, None] * S.outputs + o_o[None, :], mask=m_dy, other=0.0
                )
                p_w = p_packed + o_row[None, :] * S.packed_columns + o_o[:, None]
                if S.channels % BLOCK_C == 0:
                    b_w = tl.load(p_w)
                else:
                    b_w = tl.load(p_w, mask=(o_c < S.channels)[None, :], other=0.0)
                b_tap = dot(b_dy, b_w, b_tap)
            if p_norm_weight is not None and DTYPE == tl.float32:
                j = (o_c * S.kernel + ky) * S.kernel + kx
                b_tap *= tl.load(p_norm_weight + j, mask=o_c < S.channels, other=0.0)[None, :]
            if p_statistics is not None:
                o_t = i_image * S.tokens + token
                mean = tl.load(p_statistics + o_t, mask=m_t, other=0.0)
                rstd = tl.load(p_statistics + count + o_t, mask=m_t, other=0.0)
                first_mean = tl.load(p_scalars + o_t, mask=m_t, other=0.0)
                second_mean = tl.load(p_scalars + count + o_t, mask=m_t, other=0.0)
                b_tap = b_tap * rstd[:, None] - first_mean[:, None]
                b_tap -= (b_x - mean[:, None]) * second_mean[:, None]
                b_tap = tl.where(m_t[:, None], b_tap, 0.0)
            b_dx += b_tap
    o = (y * S.grad_strides[2] + x * S.grad_strides[3])[:, None]
    o += (o_c * S.grad_strides[1])[None, :]
    tl.store(p_grad_x + i_image * S.grad_strides[0] + o, rounded(b_dx, DTYPE), mask=m)


def _options(how, exact: bool) -> dict:
    """Launch options; left to itself, the assembler spills float32 kernels to fit one block more."""
    return {"num_warps": how.warps, "num_stages": how.stages, "maxnreg": 255 if exact else None}


def _fold(
    weight: Tensor, bias, norm_weight, norm_bias, split: Split
) -> tuple[Tensor, Tensor, Tensor]:
    """W∘γ packed (in float32, W), the row sums of W∘γ, and Wβ + b and b."""
    packed = weight.new_empty((split.packed_rows, split.packed_columns))
    row_sums = weight.new_empty(split.packed_columns, dtype=torch.float32)
    offset = weight.new_empty((2, split.packed_columns), dtype=torch.float32)
    with device_guard(weight):
        fold_kernel[(triton.cdiv(split.packed_columns, _FOLD_COLUMNS),)](
            weight,
            bias,
            norm_weight,
            norm_bias,
            packed,
            row_sums,
            offset,
            S=split,
            ROWS=_FOLD_ROWS,
            COLUMNS=_FOLD_COLUMNS,
            num_warps=4,
        )
    return packed, row_sums, offset


def _project(
    x: Tensor, folded: tuple, norm: list, split: Split, eps: float, statistics=None
) -> Tensor:
    y = x.new_empty((x.shape[0], split.tokens, split.outputs))
    # Without the norm, the loop is products alone and has registers for a deeper pipeline.
    entry = table(x.device)
    how = launch(entry.map_gradient if norm[0] is None else entry.project, x.dtype, 64)
    if y.numel() > 0:
        with device_guard(x):
            project_kernel[(x.shape[0] * triton.cdiv(split.tokens, how.block_t), split.groups)](
                x,
                *folded,
                *norm,
                y,
                statistics,
                eps,
                S=split,
                BLOCK_T=how.block_t,
                **_options(how, x.dtype == torch.float32),
            )
    return y


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


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
    split = split_of(x, weight.shape[0], kernel_size, stride, padding)
    parameters = _contiguous(weight, bias, norm_weight, norm_bias)
    return _project(x, _fold(*parameters, split), parameters[2:], split, eps)


class Projection:
    """The projection again, for the backward: its result ``y``, and what its gradients are made of."""

    def __init__(
        self, x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, eps, need_x
    ):
        self.grad_x = like_map(x) if need_x else x.new_empty(0)
        self.split = split_of(
            x, weight.shape[0], kernel_size, stride, padding, self.grad_x if need_x else None
        )
        self.x, self.need_x = x, need_x
        self.weight, bias, *self.norm = _contiguous(weight, bias, norm_weight, norm_bias)
        self.folded = _fold(self.weight, bias, *self.norm, self.split)
        self.y = self.statistics = None
        if norm_weight is not None:
            count = x.shape[0] * self.split.tokens
            self.statistics = x.new_empty((2, count), dtype=torch.float32)
            self.y = _project(x, self.folded, self.norm, self.split, eps, self.statistics)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of map, weight, bias and norm; those that are not asked for are empty."""
        dy = dy.contiguous()
        if self.need_x and self.x.numel() > 0:
            self._map_gradient(dy)
        return self.grad_x, *self._parameter_gradients(dy)

    def _map_gradient(self, dy: Tensor) -> None:
        split, x = self.split, self.x
        packed, *vectors = self.folded
        count, scalars = x.shape[0] * split.tokens, None
        how = launch(table(x.device).map_gradient, x.dtype, 64)
        block_c = SMALLEST_SIDE if split.flat else split.block_j
        side = [triton.cdiv(length, split.stride) for length in (split.height, split.width)]
        tiles = triton.cdiv(side[0] * side[1], how.block_t)
        with device_guard(x):
            if self.y is not None:
                scalars = torch.empty_like(self.statistics)
                token_scalars_kernel[(triton.cdiv(count, 32),)](
                    dy,
                    self.y,
                    self.statistics,
                    *vectors,
                    scalars,
                    count,
                    S=split,
                    BLOCK_T=32,
                    num_warps=4,
                )
            map_gradient_kernel[
                (x.shape[0] * tiles, split.stride**2, triton.cdiv(split.channels, block_c))
            ](
                dy,
                packed,
                self.norm[0],
                x,
                self.statistics,
                scalars,
                self.grad_x,
                count,
                S=split,
                BLOCK_T=how.block_t,
                BLOCK_C=block_c,
                **_options(how, x.dtype == torch.float32),
            )

    def _parameter_gradients(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        split, x, weight = self.split, self.x, self.weight
        entry = table(x.device)
        how = launch(entry.weight_gradient, x.dtype, 64)
        shape = (1 + split.packed_rows, split.packed_columns)
        # A program for each block of elements and group of outputs: two per multiprocessor in all.
        slots = slot_count(
            triton.cdiv(2 * entry.slots, split.blocks * split.groups),
            x.shape[0] * triton.cdiv(split.tokens, how.block_t),
            shape[0] * shape[1],
        )
        parts = x.new_empty((slots, shape[0] * shape[1]), dtype=torch.float32)
        with device_guard(x):
            weight_gradient_kernel[(slots, split.blocks, split.groups)](
                x,
                dy,
                self.statistics,
                parts,
                x.shape[0],
                S=split,
                BLOCK_T=how.block_t,
                **_options(how, x.dtype == torch.float32),
            )
            sums = sum_slots(parts, torch.float32)
            grad_weight = torch.empty_like(weight)
            grad_bias = weight.new_empty(split.outputs)
            grad_norm = [
                weight.new_empty(0 if self.y is None else split.elements) for _ in range(2)
            ]
            unfold_kernel[(triton.cdiv(split.packed_rows, _FOLD_COLUMNS),)](
                sums,
                weight,
                *self.norm,
                grad_weight,
                grad_bias,
                *grad_norm,
                S=split,
                ROWS=_FOLD_COLUMNS,
                num_warps=4,
            )
        return grad_weight, grad_bias, *grad_norm


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
    projection = Projection(
        x, weight, None, norm_weight, norm_bias, kernel_size, stride, padding, eps, need_x
    )
    return projection.backward(grad)


torch.library.impl("t2t_triton::soft_split_linear", IMPL_DEVICES)(soft_split_linear)
torch.library.impl("t2t_triton::soft_split_linear_backward", IMPL_DEVICES)(
    soft_split_linear_backward
)
