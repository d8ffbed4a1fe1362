"""Products of a tile with a matrix in memory, which is loaded as it is needed and in parts.

The matrix may have another dtype than the tile: random features do. Each part is converted to the
tile's dtype.

A thread has too few registers for more of a product's operands at a time, and a float32 operand, split
in three, takes the most.
"""

import triton
import triton.language as tl

from t2t_kernels._triton import dot
from t2t_kernels._triton.split import add_to_slot

# Elements of the dimension summed over, and rows of a result that is added to memory, at a time.
_PART, _FLOAT32_PART = tl.constexpr(64), tl.constexpr(32)


@triton.jit
def _load_part(p, row: tl.constexpr, column: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
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
def _column_halves(b):
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def times_matrix(b, p, acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr, first: tl.constexpr = 0):
    """b·M + acc, M being (ROWS, COLUMNS) at ``p``; b meets its rows from ``first`` on."""
    PART: tl.constexpr = _FLOAT32_PART if b.dtype == tl.float32 else _PART
    SIZE: tl.constexpr = b.shape[1]
    if SIZE > PART:
        b_left, b_right = _column_halves(b)
        acc = times_matrix(b_left, p, acc, ROWS, COLUMNS, first)
        return times_matrix(b_right, p, acc, ROWS, COLUMNS, first + SIZE // 2)
    else:
        b_part = _load_part(p, first, 0, SIZE, acc.shape[1], ROWS, COLUMNS)
        return dot(b, b_part.to(b.dtype), acc)


@triton.jit
def times_transposed(b, p, acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr, first: tl.constexpr = 0):
    """b·Mᵀ + acc, M being (ROWS, COLUMNS) at ``p``; b meets its columns from ``first`` on."""
    PART: tl.constexpr = _FLOAT32_PART if b.dtype == tl.float32 else _PART
    SIZE: tl.constexpr = b.shape[1]
    if SIZE > PART:
        b_left, b_right = _column_halves(b)
        acc = times_transposed(b_left, p, acc, ROWS, COLUMNS, first)
        return times_transposed(b_right, p, acc, ROWS, COLUMNS, first + SIZE // 2)
    else:
        b_part = _load_part(p, 0, first, acc.shape[1], SIZE, ROWS, COLUMNS)
        return dot(b, tl.trans(b_part.to(b.dtype)), acc)


@triton.jit
def add_product(p, b_left, b_right, started):
    """Add leftᵀ·right to a contiguous matrix at ``p``, which holds nothing until ``started``."""
    ROWS: tl.constexpr = b_left.shape[1]
    COLUMNS: tl.constexpr = b_right.shape[1]
    if ROWS > (_FLOAT32_PART if b_left.dtype == tl.float32 else _PART):
        b_first, b_second = _column_halves(b_left)
        add_product(p, b_first, b_right, started)
        add_product(p + ROWS // 2 * COLUMNS, b_second, b_right, started)
    else:
        b = dot(tl.trans(b_left), b_right, tl.zeros([ROWS, COLUMNS], tl.float32))
        o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        add_to_slot(p + o, b, started)
