"""Tensors in layouts that the CUDA kernels treat differently, surrounded by NaN."""

import torch


def inside_nan(x, size, stride, offset=0):
    """``x`` as a view with the given strides of memory that is otherwise NaN."""
    extent = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    memory = torch.full((max(0, extent) + 16,), torch.nan, dtype=x.dtype)
    return memory.as_strided(size, stride, offset).copy_(x)


def nchw(x):
    return inside_nan(x, x.shape, x.contiguous().stride(), 8)


def nhwc(x):
    return x.contiguous(memory_format=torch.channels_last)


def nhwc_misaligned(x):
    batch, channels, height, width = x.shape
    stride = (channels * height * width, 1, channels * width, channels)
    return inside_nan(x, x.shape, stride, 1)


def channels_of_a_wider_map(x):
    batch, channels, height, width = x.shape
    pixel = channels + 16
    return inside_nan(x, x.shape, (pixel * height * width, 1, pixel * width, pixel), 8)


def every_other_pixel(x):
    batch, channels, height, width = x.shape
    stride = (channels * height * width * 4, height * width * 4, width * 4, 2)
    return inside_nan(x, x.shape, stride, 3)


def misaligned(grad):
    return inside_nan(grad, grad.shape, grad.contiguous().stride(), 1)
