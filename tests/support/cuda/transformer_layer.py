"""Calls of transformer_layer's CUDA source that its tests and those for Hopper share."""

import torch

from tests.support.kernels.params import transformer_params

# Map, kernel_size, stride, padding, each for a path of the kernels, which take E = M = 64.
CASES = {
    "map": ((2, 64, 9, 8), (3, 2, 1)),
    "image": ((2, 3, 22, 18), (7, 4, 2)),
    "several-blocks-of-an-image": ((1, 4, 13, 12), (2, 1, 1)),
    "several-blocks-of-tails": ((3, 3, 10, 11), (3, 1, 1)),
    "one-token": ((5, 3, 2, 2), (3, 2, 1)),
}


SIZES = (64, 64)


def arguments(case, dtype):
    shape, split = CASES[case]
    torch.manual_seed(len(case))
    params = transformer_params(shape[1] * split[0] ** 2, *SIZES, dtype=torch.float32)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [tensor.to(dtype) for tensor in (x, *params)], split


def results(ops, dtype):
    """Results of both operators for maps that cover most paths of every kernel."""
    for case in ("several-blocks-of-tails", "map"):
        tensors, split = arguments(case, dtype)
        y, *saved = ops.transformer_layer(*tensors, *split, 0.3)
        yield from (y, *saved)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        yield from ops.transformer_layer_backward(grad, *tensors, *saved, *split, 0.3, True)
