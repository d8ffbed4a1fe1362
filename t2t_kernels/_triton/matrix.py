"""Products of a tile with a matrix in memory, which is loaded as it is needed and in parts.

A part of a float32 product takes six registers per four elements of its operands; more than 64 rows
of the right one at a time are more than a thread has.
"""

import triton
import triton.language as tl

from t2t_kernels._triton import dot
from t2t_kernels._triton.split import add_to_slot

_PART = tl.constexpr(64)


@triton.jit
def load_part(p, row: tl.constexpr, column: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """HEIGHT × WIDTH elements of a contiguous (ROWS, COLUMNS) matrix, zero beyond it."""
    o_r = row + tl.arange(0, HEIGHT)
    o_c = column + tl.arange(0, WIDTH)
    p = p + o_r[:, None] * COLUMNS + o_c[None, :]
    # Masks that are always true still take registers.
    if row + HEIGHT <= ROWS and column + WIDTH <= COLUMNS:
        return tl.load(p)
    else:
        return tl.load(p, mask=(o_r < ROWS)[:, None] & (o_c < COLUMNS)[None, :], other=0.0)


@triton.jit
def column_halves(b):
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def times_matrix(b, p, acc, ROWS: tl.constexpr, ROWS_P: tl.constexpr, COLUMNS: tl.constexpr,
                 COLUMNS_P: tl.constexpr):  # fmt: skip
    """b·M + acc."""
    if ROWS_P > _PART:
        HALF: tl.constexpr = ROWS_P // 2
        b_left, b_right = column_halves(b)
        acc = dot(b_left, load_part(p, 0, 0, HALF, COLUMNS_P, ROWS, COLUMNS), acc)
        return dot(b_right, load_part(p, HALF, 0, HALF, COLUMNS_P, ROWS, COLUMNS), acc)
    else:
        return dot(b, load_part(p, 0, 0, ROWS_P, COLUMNS_P, ROWS, COLUMNS), acc)


@triton.jit
def times_transposed(b, p, acc, ROWS: tl.constexpr, ROWS_P: tl.constexpr, COLUMNS: tl.constexpr,
                     COLUMNS_P: tl.constexpr):  # fmt: skip
    """b·Mᵀ + acc."""
    if COLUMNS_P > _PART:
        HALF: tl.constexpr = COLUMNS_P // 2
        b_left, b_right = column_halves(b)
        acc = dot(b_left, tl.trans(load_part(p, 0, 0, ROWS_P, HALF, ROWS, COLUMNS)), acc)
        return dot(b_right, tl.trans(load_part(p, 0, HALF, ROWS_P, HALF, ROWS, COLUMNS)), acc)
    else:
        return dot(b, tl.trans(load_part(p, 0, 0, ROWS_P, COLUMNS_P, ROWS, COLUMNS)), acc)


@triton.jit
def _add_product(p, b_left, b_right, started, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    b = dot(tl.trans(b_left), b_right, tl.zeros([ROWS, COLUMNS], tl.float32))
    add_to_slot(p + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], b, started)


@triton.jit
def add_product(p, b_left, b_right, started, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add leftᵀ·right to a contiguous (ROWS, COLUMNS) matrix, of which nothing is there till ``started``."""
    if ROWS > _PART:
        HALF: tl.constexpr = ROWS // 2
        b_first, b_second = column_halves(b_left)
        _add_product(p, b_first, b_right, started, HALF, COLUMNS)
        _add_product(p + HALF * COLUMNS, b_second, b_right, started, HALF, COLUMNS)
    else:
        _add_product(p, b_left, b_right, started, ROWS, COLUMNS)
