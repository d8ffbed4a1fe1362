"""Products of a tile with a matrix in memory, which is loaded as it is needed and in parts.

A matrix of which nothing may be lost is held in parts, see ``in_parts``: its values rounded to the tile's
dtype and, for half types, their remainders. One part follows the other.

A thread has too few registers for more of a product's operands at a time, and a float32 operand, split
in three, takes the most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import device_guard, dot, rounded

# Elements of the dimension summed over at a time.
_PART, _FLOAT32_PART = tl.constexpr(64), tl.constexpr(32)


@triton.jit
def load_matrix(
    p,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    row: tl.constexpr = 0,
    column: tl.constexpr = 0,
    TRANSPOSED: tl.constexpr = False,
):
    """HEIGHT × WIDTH elements of a contiguous (ROWS, COLUMNS) matrix, zero beyond it.

    TRANSPOSED: as WIDTH × HEIGHT. A tile that is loaded so costs the product fewer registers than one that
    is transposed afterwards.
    """
    o_r = row + tl.arange(0, HEIGHT)
    o_c = column + tl.arange(0, WIDTH)
    o = (
        o_r[None, :] * COLUMNS + o_c[:, None]
        if TRANSPOSED
        else o_r[:, None] * COLUMNS + o_c[None, :]
    )
    # Masks that are always true still take registers.
    if row + HEIGHT <= ROWS and column + WIDTH <= COLUMNS:
        return tl.load(p + o)
    elif TRANSPOSED:
        return tl.load(p + o, mask=(o_r < ROWS)[None, :] & (o_c < COLUMNS)[:, None], other=0.0)
    else:
        return tl.load(p + o, mask=(o_r < ROWS)[:, None] & (o_c < COLUMNS)[None, :], other=0.0)


@triton.jit
def _column_halves(b):
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def times_matrix(
    b,
    p,
    acc,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr = 1,
    first: tl.constexpr = 0,
    DISTANCE: tl.constexpr = 0,
):
    """b·M + acc, M being (ROWS, COLUMNS) at ``p``; b meets its rows from ``first`` on.

    DISTANCE: elements from one part to the next, if the parts have other rows besides.
    """
    SIZE: tl.constexpr = b.shape[1]
    if SIZE > (_FLOAT32_PART if b.dtype == tl.float32 else _PART):
        b_left, b_right = _column_halves(b)
        acc = times_matrix(b_left, p, acc, ROWS, COLUMNS, PARTS, first, DISTANCE)
        return times_matrix(b_right, p, acc, ROWS, COLUMNS, PARTS, first + SIZE // 2, DISTANCE)
    else:
        for i in tl.static_range(PARTS):
            p_part = p + i * (DISTANCE or ROWS * COLUMNS)
            acc = dot(b, load_matrix(p_part, ROWS, SIZE, COLUMNS, acc.shape[1], first, 0), acc)
        return acc


@triton.jit
def times_transposed(
    b,
    p,
    acc,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr = 1,
    first: tl.constexpr = 0,
    DISTANCE: tl.constexpr = 0,
):
    """b·Mᵀ + acc, M being (ROWS, COLUMNS) at ``p``; b meets its columns from ``first`` on."""
    SIZE: tl.constexpr = b.shape[1]
    if SIZE > (_FLOAT32_PART if b.dtype == tl.float32 else _PART):
        b_left, b_right = _column_halves(b)
        acc = times_transposed(b_left, p, acc, ROWS, COLUMNS, PARTS, first, DISTANCE)
        return times_transposed(b_right, p, acc, ROWS, COLUMNS, PARTS, first + SIZE // 2, DISTANCE)
    else:
        for i in tl.static_range(PARTS):
            p_part = p + i * (DISTANCE or ROWS * COLUMNS)
            b_part = load_matrix(p_part, ROWS, acc.shape[1], COLUMNS, SIZE, 0, first, True)
            acc = dot(b, b_part, acc)
        return acc


@triton.jit
def store_parts(p, b, o, m, size, PARTS: tl.constexpr):
    """Store float32 ``b`` at ``p + o`` in parts, which are ``size`` apart."""
    DTYPE: tl.constexpr = p.dtype.element_ty
    for i in tl.static_range(PARTS):
        b_part = rounded(b, DTYPE)
        tl.store(p + i * size + o, b_part, mask=m)
        b -= b_part.to(tl.float32)


@triton.jit
def parts_kernel(
    p,  # (size,)
    p_parts,  # (PARTS, size)
    size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_parts(
        p_parts, tl.load(p + o, mask=o < size, other=0.0).to(tl.float32), o, o < size, size, PARTS
    )


def part_count(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


def in_parts(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(PARTS, rows, columns) of ``dtype`` whose sum is ``matrix``, to float32's precision."""
    # Triton has no float64 on some devices; no caller's matrix needs it.
    matrix = (matrix.float() if matrix.dtype == torch.float64 else matrix).contiguous()
    parts = matrix.new_empty((part_count(dtype), *matrix.shape), dtype=dtype)
    with device_guard(matrix):
        parts_kernel[(triton.cdiv(matrix.numel(), 1024),)](
            matrix, parts, matrix.numel(), PARTS=parts.shape[0], BLOCK=1024, num_warps=4
        )
    return parts
