"""Calls of performer_layer's CUDA source that its tests and those for Hopper share."""

import torch

from tests.support.cuda.mutations import multiprocessors
from tests.support.kernels.params import performer_params

# Map, kernel_size, stride, padding, each for a path of the kernels, which take E = 64, m = 32, M = 64.
CASES = {
    "map": ((1, 64, 9, 8), (3, 2, 1)),
    "image": ((2, 3, 22, 18), (7, 4, 2)),
    "several-tiles-of-a-warp": ((3, 3, 13, 14), (3, 1, 1)),
    "token-larger-than-shared-memory": ((1, 128, 3, 3), (5, 2, 2)),
    "one-token": ((5, 3, 2, 2), (3, 2, 1)),
}


SIZES = (64, 32, 64)


def arguments(case, dtype):
    shape, split = CASES[case]
    torch.manual_seed(len(case))
    params = performer_params(shape[1] * split[0] ** 2, *SIZES, dtype=torch.float32)
    params.w.mul_((SIZES[1] / SIZES[0]) ** 0.5)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [tensor.to(dtype) for tensor in (x, *params)], split


def results(ops, dtype):
    """Results of both operators for a map that covers most paths of every kernel."""
    tensors, split = arguments("several-tiles-of-a-warp", dtype)
    seed, numbers = torch.tensor([5]), (*split, 1e-3, 0.25)
    # Several slots to add.
    with multiprocessors(3):
        y, *sums = ops.performer_layer(*tensors, seed, *numbers)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        grads = ops.performer_layer_backward(grad, *tensors, seed, *sums, *numbers, True)
    yield from (y, *sums, *grads)
