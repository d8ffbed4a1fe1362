"""What follows the attention of a T2T layer: projection, skip from v, norm, MLP; both dropouts.

a = v + dropout(proj(y)); out = a + dropout(W2·gelu(W1·LN(a) + b1) + b2), a tile of tokens at a time.
Operands of products are rounded to the map's dtype, as plain PyTorch rounds every intermediate.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import device_guard, load_vector, padded, rounded
from t2t_kernels._triton.matrix import add_product, times_matrix, times_transposed
from t2t_kernels._triton.split import add_to_slot
from t2t_kernels.backends import INTERPRETED

NORM_EPS = tl.constexpr(1e-5)
# The dropouts' sites, as in the reference.
AFTER_PROJ, AFTER_MLP = tl.constexpr(0), tl.constexpr(1)
# Elements that a program of sum_tail_gradients_kernel adds over the slots.
SUM_BLOCK = 4096 if INTERPRETED else 256

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def kept(p_seed, first_element, site, threshold, scale, EMBED: tl.constexpr, EMBED_P: tl.constexpr,
         BLOCK_T: tl.constexpr):  # fmt: skip
    """``scale`` where dropout keeps an element, else 0; rows begin at ``first_element`` (int64)."""
    seed = tl.load(p_seed)
    if EMBED % 8 == 0:
        # A block serves eight neighbours.
        block = (first_element // 8)[:, None] + tl.arange(0, EMBED_P // 8)[None, :]
    else:
        element = first_element[:, None] + tl.arange(0, EMBED_P)[None, :]
        block = element // 8
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + site, zero)
    if EMBED % 8 == 0:
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        number = tl.reshape(tl.join(word & 0xFFFF, word >> 16), (BLOCK_T, EMBED_P))
    else:
        o = (element % 8).to(tl.int32)
        word = tl.where(o < 2, w0, tl.where(o < 4, w1, tl.where(o < 6, w2, w3)))
        number = tl.where(o % 2 == 0, word & 0xFFFF, word >> 16)
    return tl.where(number >= threshold.to(tl.uint32), scale, 0.0)


@triton.jit
def tail_forward(
    b_y,
    b_v,
    b_keep,
    p_proj_weight,
    p_proj_bias,
    p_norm_weight,
    p_norm_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """a, LN(a) before its gain and bias, its 1/σ, LN(a), and the MLP's hidden values before GELU."""
    b_a = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_a = times_transposed(rounded(b_y, DTYPE), p_proj_weight, b_a, EMBED, EMBED)
    b_a += load_vector(p_proj_bias, EMBED, EMBED_P)[None, :]
    if HAS_DROPOUT:
        b_a *= b_keep
    b_a += b_v
    b_n = tl.where((tl.arange(0, EMBED_P) < EMBED)[None, :], b_a - (tl.sum(b_a, 1) / EMBED)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_n * b_n, 1) / EMBED + NORM_EPS)
    b_n = b_n * rstd[:, None]
    b_z = b_n * load_vector(p_norm_weight, EMBED, EMBED_P)[None, :]
    b_z = rounded(b_z + load_vector(p_norm_bias, EMBED, EMBED_P)[None, :], DTYPE)
    b_h = tl.zeros([BLOCK_T, HIDDEN_P], tl.float32)
    b_h = times_transposed(b_z, p_mlp1_weight, b_h, HIDDEN, EMBED)
    b_h += load_vector(p_mlp1_bias, HIDDEN, HIDDEN_P)[None, :]
    return b_a, b_n, rstd, b_z, b_h


@triton.jit
def gelu(b_h):
    return b_h * (0.5 * (1.0 + tl.erf(b_h * _SQRT_HALF)))


@triton.jit
def tail_output(
    b_a,
    b_h,
    b_keep,
    p_mlp2_weight,
    p_mlp2_bias,
    DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b_o = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_o = times_transposed(rounded(gelu(b_h), DTYPE), p_mlp2_weight, b_o, EMBED, HIDDEN)
    b_o += load_vector(p_mlp2_bias, EMBED, EMBED_P)[None, :]
    if HAS_DROPOUT:
        b_o *= b_keep
    return b_a + b_o


@triton.jit
def _add_vector(p, b, started, SIZE: tl.constexpr):
    add_to_slot(p + tl.arange(0, SIZE), b, started)


@triton.jit
def tail_backward(
    b_dout,
    b_y,
    b_n,
    rstd,
    b_z,
    b_h,
    b_keep_proj,
    b_keep_mlp,
    p_proj_weight,
    p_norm_weight,
    p_mlp1_weight,
    p_mlp2_weight,
    p_slot,
    started,
    DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ADD: tl.constexpr,
):
    """Gradients of a (so of v, by the skip) and of y.

    With ADD, also the tile's part in the parameters' gradients, in the slot in the order of
    ``sum_tail_gradients_kernel``; each as soon as it is known, while its factors are in registers.
    """
    PROJ_BIAS: tl.constexpr = EMBED_P * EMBED_P
    MLP1: tl.constexpr = PROJ_BIAS + 3 * EMBED_P
    MLP1_BIAS: tl.constexpr = MLP1 + HIDDEN_P * EMBED_P
    MLP2: tl.constexpr = MLP1_BIAS + HIDDEN_P
    b_do = b_dout
    if HAS_DROPOUT:
        b_do = b_dout * b_keep_mlp
    if ADD:
        _add_vector(p_slot + MLP2 + EMBED_P * HIDDEN_P, tl.sum(b_do, 0), started, EMBED_P)
        add_product(p_slot + MLP2, rounded(b_do, DTYPE), rounded(gelu(b_h), DTYPE), started)
    b_dh = tl.zeros([BLOCK_T, HIDDEN_P], tl.float32)
    b_dh = times_matrix(rounded(b_do, DTYPE), p_mlp2_weight, b_dh, EMBED, HIDDEN)
    b_phi = 0.5 * (1.0 + tl.erf(b_h * _SQRT_HALF))
    b_dh *= b_phi + b_h * tl.exp(-0.5 * b_h * b_h) * _RSQRT_2PI
    if ADD:
        _add_vector(p_slot + MLP1_BIAS, tl.sum(b_dh, 0), started, HIDDEN_P)
        add_product(p_slot + MLP1, rounded(b_dh, DTYPE), b_z, started)
    b_dz = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_dz = times_matrix(rounded(b_dh, DTYPE), p_mlp1_weight, b_dz, HIDDEN, EMBED)
    if ADD:
        _add_vector(p_slot + PROJ_BIAS + EMBED_P, tl.sum(b_dz * b_n, 0), started, EMBED_P)
        _add_vector(p_slot + PROJ_BIAS + 2 * EMBED_P, tl.sum(b_dz, 0), started, EMBED_P)
    b_dn = b_dz * load_vector(p_norm_weight, EMBED, EMBED_P)[None, :]
    mean = tl.sum(b_dn, 1) / EMBED
    mean_n = tl.sum(b_dn * b_n, 1) / EMBED
    b_da = b_dn - mean[:, None] - b_n * mean_n[:, None]
    b_da = tl.where((tl.arange(0, EMBED_P) < EMBED)[None, :], b_dout + b_da * rstd[:, None], 0.0)
    b_dp = b_da
    if HAS_DROPOUT:
        b_dp = b_da * b_keep_proj
    if ADD:
        _add_vector(p_slot + PROJ_BIAS, tl.sum(b_dp, 0), started, EMBED_P)
        add_product(p_slot, rounded(b_dp, DTYPE), rounded(b_y, DTYPE), started)
    b_dy = tl.zeros([BLOCK_T, EMBED_P], tl.float32)
    b_dy = times_matrix(rounded(b_dp, DTYPE), p_proj_weight, b_dy, EMBED, EMBED)
    return b_da, b_dy


def tail_slot_size(embed_p: int, hidden_p: int) -> int:
    return embed_p * (embed_p + 2 * hidden_p + 4) + hidden_p


@triton.jit
def _store_part(p, b, o, start: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                ROWS_P: tl.constexpr, COLUMNS_P: tl.constexpr):  # fmt: skip
    local = o - start
    row = local // COLUMNS_P
    column = local % COLUMNS_P
    m = (local >= 0) & (local < ROWS_P * COLUMNS_P) & (row < ROWS) & (column < COLUMNS)
    tl.store(p + row * COLUMNS + column, rounded(b, p.dtype.element_ty), mask=m)


@triton.jit
def sum_tail_gradients_kernel(
    p_slots,
    p_proj_weight,
    p_proj_bias,
    p_norm_weight,
    p_norm_bias,
    p_mlp1_weight,
    p_mlp1_bias,
    p_mlp2_weight,
    p_mlp2_bias,
    slots,
    slot_size,
    EMBED: tl.constexpr,
    EMBED_P: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the slots one after the other, and tell the parameters' gradients apart."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.zeros([BLOCK], tl.float32)
    for i in range(0, slots):
        b += tl.load(p_slots + i * slot_size + o, mask=o < slot_size, other=0.0)
    PROJ_BIAS: tl.constexpr = EMBED_P * EMBED_P
    MLP1: tl.constexpr = PROJ_BIAS + 3 * EMBED_P
    MLP1_BIAS: tl.constexpr = MLP1 + HIDDEN_P * EMBED_P
    MLP2: tl.constexpr = MLP1_BIAS + HIDDEN_P
    MLP2_BIAS: tl.constexpr = MLP2 + EMBED_P * HIDDEN_P
    _store_part(p_proj_weight, b, o, 0, EMBED, EMBED, EMBED_P, EMBED_P)
    _store_part(p_proj_bias, b, o, PROJ_BIAS, 1, EMBED, 1, EMBED_P)
    _store_part(p_norm_weight, b, o, PROJ_BIAS + EMBED_P, 1, EMBED, 1, EMBED_P)
    _store_part(p_norm_bias, b, o, PROJ_BIAS + 2 * EMBED_P, 1, EMBED, 1, EMBED_P)
    _store_part(p_mlp1_weight, b, o, MLP1, HIDDEN, EMBED, HIDDEN_P, EMBED_P)
    _store_part(p_mlp1_bias, b, o, MLP1_BIAS, 1, HIDDEN, 1, HIDDEN_P)
    _store_part(p_mlp2_weight, b, o, MLP2, EMBED, HIDDEN, EMBED_P, HIDDEN_P)
    _store_part(p_mlp2_bias, b, o, MLP2_BIAS, 1, EMBED, 1, EMBED_P)


def sum_tail_gradients(slots: Tensor, tail: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the tail's parameters, in the order of ``tail``, from the slots."""
    grads = [torch.empty_like(tensor) for tensor in tail]
    hidden, embed = tail[4].shape
    with device_guard(slots):
        sum_tail_gradients_kernel[(triton.cdiv(slots.shape[1], SUM_BLOCK),)](
            slots,
            *grads,
            *slots.shape,
            EMBED=embed,
            EMBED_P=padded(embed),
            HIDDEN=hidden,
            HIDDEN_P=padded(hidden),
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
    return grads
