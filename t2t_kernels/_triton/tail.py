"""What follows the attention of a T2T layer: projection, skip from v, norm, MLP; both dropouts.

a = v + dropout(proj(y)); out = a + dropout(W2·gelu(W1·LN(a) + b1) + b2), a tile of tokens at a time.
Operands of products are rounded to the map's dtype, as plain PyTorch rounds every intermediate.

The kernels read the eight parameters from one vector, ``pack_tail``, and add their gradients in its order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import (
    Sizes,
    device_guard,
    dot,
    launch,
    load_rows,
    load_vector,
    rounded,
    slot_count,
    store_rows,
    strides,
    sum_slots,
    table,
)
from t2t_kernels._triton.matrix import load_matrix, times_matrix, times_transposed
from t2t_kernels.philox import rounded_probability

NORM_EPS = tl.constexpr(1e-5)
# The dropouts' sites, as in the reference.
_AFTER_PROJ, _AFTER_MLP = tl.constexpr(0), tl.constexpr(1)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_2PI = tl.constexpr(0.3989422804014327)


def pack_tail(parameters: Sequence[Tensor]) -> tuple[Tensor, Sizes]:
    """The tail's parameters one after the other, and E and M."""
    sizes = Sizes(parameters[0].shape[0], hidden=parameters[4].shape[0])
    return torch.cat([parameter.reshape(-1) for parameter in parameters]), sizes


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The smallest number that keeps an element, and the factor of what is kept."""
    dropped = rounded_probability(dropout_p)
    return round(dropped * 2**16), 0.0 if dropped == 1 else 1 / (1 - dropped)


@triton.jit
def _kept(p_seed, first_element, site: tl.constexpr, threshold, scale, D: tl.constexpr):
    """``scale`` where dropout keeps an element, else 0; rows begin at ``first_element`` (int64)."""
    seed = tl.load(p_seed)
    if D.embed % 8 == 0:
        # A block serves eight neighbours.
        block = (first_element // 8)[:, None] + tl.arange(0, D.embed_p // 8)[None, :]
    else:
        element = first_element[:, None] + tl.arange(0, D.embed_p)[None, :]
        block = element // 8
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + site, zero)
    if D.embed % 8 == 0:
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        number = tl.reshape(tl.join(word & 0xFFFF, word >> 16), (low.shape[0], D.embed_p))
    else:
        o = (element % 8).to(tl.int32)
        word = tl.where(o < 2, w0, tl.where(o < 4, w1, tl.where(o < 6, w2, w3)))
        number = tl.where(o % 2 == 0, word & 0xFFFF, word >> 16)
    return tl.where(number >= threshold.to(tl.uint32), scale, 0.0)


@triton.jit
def _attended(b_y, b_v, p_tail, p_seed, element, threshold, scale, D: tl.constexpr):
    """a from y and v (float32)."""
    if p_seed is not None:
        b_keep = _kept(p_seed, element, _AFTER_PROJ, threshold, scale, D)
    b_a = tl.zeros([b_y.shape[0], tl.constexpr(D.embed_p)], tl.float32)
    b_a = times_transposed(rounded(b_y, p_tail.dtype.element_ty), p_tail, b_a, D.embed, D.embed)
    b_a += load_vector(p_tail + D.proj_bias, D.embed, D.embed_p)[None, :]
    if p_seed is not None:
        b_a *= b_keep
    return b_a + b_v


@triton.jit
def _normalized(b_a, D: tl.constexpr):
    """LN(a) before its gain and bias, and 1/σ."""
    b_n = b_a - (tl.sum(b_a, 1) / D.embed)[:, None]
    b_n = tl.where((tl.arange(0, D.embed_p) < D.embed)[None, :], b_n, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_n * b_n, 1) / D.embed + NORM_EPS)
    return b_n * rstd[:, None], rstd


@triton.jit
def _hidden(b_n, p_tail, D: tl.constexpr):
    """The MLP's hidden values before GELU."""
    b_h = tl.zeros([b_n.shape[0], tl.constexpr(D.hidden_p)], tl.float32)
    b_h = times_transposed(_gain(b_n, p_tail, D), p_tail + D.fc1, b_h, D.hidden, D.embed)
    return b_h + load_vector(p_tail + D.fc1_bias, D.hidden, D.hidden_p)[None, :]


@triton.jit
def _gain(b_n, p_tail, D: tl.constexpr):
    """LN(a)."""
    b_z = b_n * load_vector(p_tail + D.norm, D.embed, D.embed_p)[None, :]
    b_z += load_vector(p_tail + D.norm + D.embed, D.embed, D.embed_p)[None, :]
    return rounded(b_z, p_tail.dtype.element_ty)


@triton.jit
def _normal(b_h, DTYPE: tl.constexpr):
    """Φ(h) and e^(−h²/2)."""
    b_exp = tl.exp(-0.5 * b_h * b_h)
    if DTYPE == tl.float32:
        return 0.5 + 0.5 * tl.erf(b_h * _SQRT_HALF), b_exp
    else:
        # Abramowitz and Stegun 7.1.26: error below 10⁻⁷.
        b_t = 1.0 / (1.0 + 0.3275911 * _SQRT_HALF * tl.abs(b_h))
        b = (0.5 * 1.061405429 * b_t - 0.5 * 1.453152027) * b_t + 0.5 * 1.421413741
        b = ((b * b_t - 0.5 * 0.284496736) * b_t + 0.5 * 0.254829592) * b_t * b_exp
        return tl.where(b_h > 0, 1.0 - b, b), b_exp


@triton.jit
def tail(b_y, b_v, p_tail, p_seed, element, threshold, scale, D: tl.constexpr):
    """The layer's result from y and v (float32); ``element``: the first of each row, for dropout."""
    DTYPE: tl.constexpr = p_tail.dtype.element_ty
    b_a = _attended(b_y, b_v, p_tail, p_seed, element, threshold, scale, D)
    b_n, rstd = _normalized(b_a, D)
    b_h = _hidden(b_n, p_tail, D)
    b_phi, b_exp = _normal(b_h, DTYPE)
    b_o = tl.zeros(b_y.shape, tl.float32)
    b_o = times_transposed(rounded(b_h * b_phi, DTYPE), p_tail + D.fc2, b_o, D.embed, D.hidden)
    b_o += load_vector(p_tail + D.fc2_bias, D.embed, D.embed_p)[None, :]
    if p_seed is not None:
        b_o *= _kept(p_seed, element, _AFTER_MLP, threshold, scale, D)
    return b_a + b_o


@triton.jit
def _ones(ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Ones in the first of 16 columns: the matrix unit sums over the rows of what they are multiplied with."""
    b = tl.where(tl.arange(0, 16) == 0, 1.0, 0.0)[None, :] + tl.zeros([ROWS, 16], tl.float32)
    return b.to(DTYPE)


@triton.jit
def _store_matrix(p, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_r = tl.arange(0, b.shape[0])
    o_c = tl.arange(0, b.shape[1])
    m = (o_r < ROWS)[:, None] & (o_c < COLUMNS)[None, :]
    tl.store(p + o_r[:, None] * COLUMNS + o_c[None, :], b, mask=m)


@triton.jit
def _store_vector(p, b, SIZE: tl.constexpr):
    o = tl.arange(0, b.shape[0])
    tl.store(p + o, b, mask=o < SIZE)


@triton.jit
def _tile(item, tokens, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Image, tokens and their mask of a tile, and where the image begins in a contiguous (B, T, E) tensor."""
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_image = tl.zeros((), tl.int64) + item // tiles
    o_t = item % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    return i_image, o_t, o_t < tokens, i_image * tokens * D.embed


@triton.jit(do_not_specialize=["threshold"])
def fc2_backward_kernel(
    p_dout,  # (B, T, E)
    p_y,  # (B, T, E)
    p_v,  # (B, T, E)
    p_tail,  # (D.tail,)
    p_seed,  # (1,) int64, or None without dropout
    p_dh,  # (B, T, M)
    p_slots,  # (slots, D.tail) float32
    items,
    tokens,
    threshold,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    DH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients of the hidden values before GELU, and of fc2. HIDDEN: D with M in place of E."""
    DTYPE: tl.constexpr = p_tail.dtype.element_ty
    R: tl.constexpr = D.contiguous
    b_fc2 = tl.zeros([tl.constexpr(D.embed_p), tl.constexpr(D.hidden_p)], tl.float32)
    fc2_bias = tl.zeros([tl.constexpr(D.embed_p), 16], tl.float32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image, o_t, m_t, o_image = _tile(item, tokens, D, BLOCK_T)
        element = o_image + o_t * D.embed
        b_do = load_rows(p_dout + o_image, 0, o_t, m_t, R, D)
        if p_seed is not None:
            b_keep = _kept(p_seed, element, _AFTER_MLP, threshold, scale, D)
            b_do = rounded(b_do.to(tl.float32) * b_keep, DTYPE)
        b_y = load_rows(p_y + o_image, 0, o_t, m_t, R, D).to(tl.float32)
        b_v = load_rows(p_v, i_image, o_t, m_t, V, D).to(tl.float32)
        b_a = _attended(b_y, b_v, p_tail, p_seed, element, threshold, scale, D)
        b_n, rstd = _normalized(b_a, D)
        b_h = _hidden(b_n, p_tail, D)
        # Before GELU, while few other values are held.
        b_dh = tl.zeros([BLOCK_T, tl.constexpr(D.hidden_p)], tl.float32)
        b_dh = times_matrix(b_do, p_tail + D.fc2, b_dh, D.embed, D.hidden)
        b_phi, b_exp = _normal(b_h, DTYPE)
        b_dh *= b_phi + b_h * b_exp * _RSQRT_2PI
        store_rows(p_dh, b_dh, i_image, o_t, m_t, DH, HIDDEN)
        b_gelu = rounded(b_h * b_phi, DTYPE)
        b_fc2 = dot(tl.trans(b_do), b_gelu, b_fc2)
        fc2_bias = dot(tl.trans(b_do), _ones(BLOCK_T, DTYPE), fc2_bias)
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * D.tail
    _store_matrix(p_slot + D.fc2, b_fc2, D.embed, D.hidden)
    _store_vector(p_slot + D.fc2_bias, tl.sum(fc2_bias, 1), D.embed)


@triton.jit(do_not_specialize=["threshold"])
def fc1_backward_kernel(
    p_dout,  # (B, T, E)
    p_dh,  # (B, T, M)
    p_y,  # (B, T, E)
    p_v,  # (B, T, E)
    p_tail,  # (D.tail,)
    p_seed,  # (1,) int64, or None without dropout
    p_da,  # (B, T, E)
    p_slots,  # (slots, D.tail) float32
    items,
    tokens,
    threshold,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    DH: tl.constexpr,
    DA: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients of a, fc1 and norm. HIDDEN: D with M in place of E."""
    DTYPE: tl.constexpr = p_tail.dtype.element_ty
    R: tl.constexpr = D.contiguous
    b_fc1 = tl.zeros([tl.constexpr(D.hidden_p), tl.constexpr(D.embed_p)], tl.float32)
    fc1_bias = tl.zeros([tl.constexpr(D.hidden_p), 16], tl.float32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image, o_t, m_t, o_image = _tile(item, tokens, D, BLOCK_T)
        element = o_image + o_t * D.embed
        b_y = load_rows(p_y + o_image, 0, o_t, m_t, R, D).to(tl.float32)
        b_v = load_rows(p_v, i_image, o_t, m_t, V, D).to(tl.float32)
        b_a = _attended(b_y, b_v, p_tail, p_seed, element, threshold, scale, D)
        b_n, rstd = _normalized(b_a, D)
        b_dh = load_rows(p_dh, i_image, o_t, m_t, DH, HIDDEN)
        b_dz = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
        b_dz = times_matrix(b_dh, p_tail + D.fc1, b_dz, D.hidden, D.embed)
        b_dz *= load_vector(p_tail + D.norm, D.embed, D.embed_p)[None, :]
        mean = tl.sum(b_dz, 1) / D.embed
        mean_n = tl.sum(b_dz * b_n, 1) / D.embed
        b_da = (b_dz - mean[:, None] - b_n * mean_n[:, None]) * rstd[:, None]
        b_da += load_rows(p_dout + o_image, 0, o_t, m_t, R, D).to(tl.float32)
        store_rows(p_da, b_da, i_image, o_t, m_t, DA, D)
        b_fc1 = dot(tl.trans(b_dh), rounded(b_n, DTYPE), b_fc1)
        fc1_bias = dot(tl.trans(b_dh), _ones(BLOCK_T, DTYPE), fc1_bias)
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * D.tail
    # Σ dh nᵀ and Σ dh are of the norm's result before gain and bias; both follow, and fc1's gradient.
    bias = tl.sum(fc1_bias, 1)
    b_weight = load_matrix(p_tail + D.fc1, D.hidden, D.hidden_p, D.embed, D.embed_p).to(tl.float32)
    _store_vector(p_slot + D.norm, tl.sum(b_weight * b_fc1, 0), D.embed)
    _store_vector(p_slot + D.norm + D.embed, tl.sum(b_weight * bias[:, None], 0), D.embed)
    b_fc1 *= load_vector(p_tail + D.norm, D.embed, D.embed_p)[None, :]
    b_fc1 += bias[:, None] * load_vector(p_tail + D.norm + D.embed, D.embed, D.embed_p)[None, :]
    _store_matrix(p_slot + D.fc1, b_fc1, D.hidden, D.embed)
    _store_vector(p_slot + D.fc1_bias, bias, D.hidden)


@triton.jit(do_not_specialize=["threshold"])
def proj_backward_kernel(
    p_da,  # (B, T, E)
    p_y,  # (B, T, E)
    p_tail,  # (D.tail,)
    p_seed,  # (1,) int64, or None without dropout
    p_dy,  # (B, T, E)
    p_slots,  # (slots, D.tail) float32
    items,
    tokens,
    threshold,
    scale,
    D: tl.constexpr,
    DA: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients of y and proj."""
    DTYPE: tl.constexpr = p_tail.dtype.element_ty
    R: tl.constexpr = D.contiguous
    b_proj = tl.zeros([tl.constexpr(D.embed_p), tl.constexpr(D.embed_p)], tl.float32)
    proj_bias = tl.zeros([tl.constexpr(D.embed_p), 16], tl.float32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        i_image, o_t, m_t, o_image = _tile(item, tokens, D, BLOCK_T)
        b_dp = load_rows(p_da, i_image, o_t, m_t, DA, D)
        if p_seed is not None:
            element = o_image + o_t * D.embed
            b_keep = _kept(p_seed, element, _AFTER_PROJ, threshold, scale, D)
            b_dp = rounded(b_dp.to(tl.float32) * b_keep, DTYPE)
        b_dy = tl.zeros([BLOCK_T, tl.constexpr(D.embed_p)], tl.float32)
        b_dy = times_matrix(b_dp, p_tail, b_dy, D.embed, D.embed)
        store_rows(p_dy + o_image, b_dy, 0, o_t, m_t, R, D)
        b_y = load_rows(p_y + o_image, 0, o_t, m_t, R, D).to(tl.float32)
        b_proj = dot(tl.trans(b_dp), rounded(b_y, DTYPE), b_proj)
        proj_bias = dot(tl.trans(b_dp), _ones(BLOCK_T, DTYPE), proj_bias)
    p_slot = p_slots + tl.program_id(0).to(tl.int64) * D.tail
    _store_matrix(p_slot, b_proj, D.embed, D.embed)
    _store_vector(p_slot + D.proj_bias, tl.sum(proj_bias, 1), D.embed)


def tail_backward(
    grad: Tensor,
    y: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    da: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """dy and the parameters' gradients; that of a, the skip's part of dv, is written to ``da``."""
    packed, sizes = pack_tail(parameters)
    batch, tokens, embed = v.shape
    grad = grad.contiguous()
    dy, dh = v.new_empty(v.shape), v.new_empty((batch, tokens, sizes.hidden))
    entry = table(v.device)
    how = launch(entry.tail_backward, v.dtype, embed, sizes.hidden)
    items = batch * triton.cdiv(tokens, how.block_t)
    programs = slot_count(entry.slots, items, sizes.tail)
    slots = v.new_empty((programs, sizes.tail), dtype=torch.float32)
    seed = seed if dropout_p > 0 else None
    numbers = (items, tokens, *dropout_numbers(dropout_p))
    options = {
        "D": sizes,
        "BLOCK_T": how.block_t,
        "num_warps": how.warps,
        "num_stages": how.stages,
        # Left to itself, the assembler spills to fit one block more.
        "maxnreg": 255,
    }
    layouts = {"V": strides(v), "DH": strides(dh), "HIDDEN": Sizes(sizes.hidden), **options}
    with device_guard(v):
        fc2_backward_kernel[(programs,)](grad, y, v, packed, seed, dh, slots, *numbers, **layouts)
        fc1_backward_kernel[(programs,)](
            grad, dh, y, v, packed, seed, da, slots, *numbers, DA=strides(da), **layouts
        )
        proj_backward_kernel[(programs,)](
            da, y, packed, seed, dy, slots, *numbers, DA=strides(da), **options
        )
    grads = [
        torch.empty_like(parameter, memory_format=torch.contiguous_format)
        for parameter in parameters
    ]
    sums = sum_slots(slots, packed.dtype).split([parameter.numel() for parameter in parameters])
    torch._foreach_copy_(
        grads, [part.view_as(grad) for part, grad in zip(sums, grads, strict=True)]
    )
    return dy, grads
