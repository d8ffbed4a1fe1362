"""Soft split in Triton: both directions write their result front to back, and gather what goes in.

The reads overlap by at most ⌈k/s⌉² and are caught by the caches; the writes, which are most of the
traffic forward, are contiguous whatever the layout of the other side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2t_kernels._triton import IMPL_DEVICES, device_guard
from t2t_kernels.arguments import output_size

WARPS = 4
# 8 elements a thread: a 16-byte store in half precision, two in float32.
SPLIT_BLOCK = 1024
# Half of that: a gathering thread keeps up to four tokens' addresses per element, and would spill.
GATHER_BLOCK = 512


@triton.jit
def soft_split_fwd_kernel(
    p_x,
    p_tokens,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    height,
    width,
    columns,
    blocks_per_image,
    elements_per_image,
    TOKEN_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_image = (tl.program_id(0) // blocks_per_image).to(tl.int64)
    i_block = tl.program_id(0) % blocks_per_image
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < elements_per_image

    token, j = o // TOKEN_WIDTH, o % TOKEN_WIDTH
    c, area = j // (KERNEL * KERNEL), j % (KERNEL * KERNEL)
    y = token // columns * STRIDE - PADDING + area // KERNEL
    x = token % columns * STRIDE - PADDING + area % KERNEL
    m_inside = m & (y >= 0) & (y < height) & (x >= 0) & (x < width)

    o_x = i_image * stride_b + c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h
    b_x = tl.load(p_x + o_x + x.to(tl.int64) * stride_w, mask=m_inside, other=0.0)
    tl.store(p_tokens + i_image * elements_per_image + o, b_x, mask=m)


@triton.jit
def soft_split_bwd_kernel(
    p_grad,
    p_x,
    stride_b,
    stride_t,
    stride_j,
    height,
    width,
    rows,
    columns,
    blocks_per_image,
    elements_per_image,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_image = (tl.program_id(0) // blocks_per_image).to(tl.int64)
    i_block = tl.program_id(0) % blocks_per_image
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < elements_per_image

    if CHANNELS_LAST:
        c, x, y = o % CHANNELS, o // CHANNELS % width, o // CHANNELS // width
    else:
        x, y, c = o % width, o // width % height, o // width // height
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    # The last token that can cover the pixel, then those before it: at most ⌈k/s⌉ per direction.
    for i in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        row = (y + PADDING) // STRIDE - i
        ky = y + PADDING - row * STRIDE
        m_row = m & (row >= 0) & (row < rows) & (ky < KERNEL)
        for j in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            column = (x + PADDING) // STRIDE - j
            kx = x + PADDING - column * STRIDE
            m_token = m_row & (column >= 0) & (column < columns) & (kx < KERNEL)
            token = (row * columns + column).to(tl.int64)
            o_j = ((c * KERNEL + ky) * KERNEL + kx).to(tl.int64)
            p_token = p_grad + i_image * stride_b + token * stride_t
            b_sum += tl.load(p_token + o_j * stride_j, mask=m_token, other=0.0).to(tl.float32)
    p_out = p_x + i_image * elements_per_image + o
    tl.store(p_out, b_sum.to(p_x.dtype.element_ty), mask=m)


def soft_split(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    batch, channels, height, width = x.shape
    rows, columns = output_size(height, width, kernel_size, stride, padding)
    token_width = channels * kernel_size**2
    tokens = x.new_empty((batch, rows * columns, token_width))
    elements = rows * columns * token_width
    blocks, grid = _grid(batch, elements, SPLIT_BLOCK)
    if batch > 0:
        with device_guard(x):
            soft_split_fwd_kernel[grid](
                x,
                tokens,
                *x.stride(),
                height,
                width,
                columns,
                blocks,
                elements,
                TOKEN_WIDTH=token_width,
                KERNEL=kernel_size,
                STRIDE=stride,
                PADDING=padding,
                BLOCK=SPLIT_BLOCK,
                num_warps=WARPS,
            )
    return tokens


def soft_split_backward(
    grad: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    padding: int,
    channels_last: bool,
) -> Tensor:
    batch, channels = grad.shape[0], grad.shape[2] // kernel_size**2
    rows, columns = output_size(height, width, kernel_size, stride, padding)
    x = torch.empty(
        (batch, channels, height, width),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    elements = channels * height * width
    blocks, grid = _grid(batch, elements, GATHER_BLOCK)
    if batch > 0:
        with device_guard(grad):
            soft_split_bwd_kernel[grid](
                grad,
                x,
                *grad.stride(),
                height,
                width,
                rows,
                columns,
                blocks,
                elements,
                CHANNELS=channels,
                KERNEL=kernel_size,
                STRIDE=stride,
                PADDING=padding,
                CHANNELS_LAST=channels_last,
                BLOCK=GATHER_BLOCK,
                num_warps=WARPS,
            )
    return x


def _grid(batch: int, elements_per_image: int, block: int) -> tuple[int, tuple[int]]:
    blocks = triton.cdiv(elements_per_image, block)
    # Offsets inside an image and the number of programs are 32 bits wide; those of images are not.
    if elements_per_image >= 2**31 - block or batch * blocks >= 2**31:
        raise ValueError(
            f"soft_split on the triton backend: {batch} × {elements_per_image} elements are too many "
            "for one launch; split the batch"
        )
    return blocks, (batch * blocks,)


torch.library.impl("t2t_triton::soft_split", IMPL_DEVICES)(soft_split)
torch.library.impl("t2t_triton::soft_split_backward", IMPL_DEVICES)(soft_split_backward)
