"""Calls of soft_split_linear's CUDA source that its tests and those for Hopper share."""

import torch

from tests.support.cuda.layouts import nchw, nhwc
from tests.support.cuda.mutations import multiprocessors
from tests.support.kernels.soft_split_linear import arguments

# Channels, split, outputs.
MODELS = {"image": (3, (7, 4, 2), 192), "map": (64, (3, 2, 1), 192)}


# Maps that take every kernel through most of its paths, with the multiprocessors that make one block
# or several of them.
MAPS = (
    ((2, 3, 12, 11), (3, 2, 1), 200, nchw, 1),
    ((3, 3, 16, 14), (7, 2, 2), 64, nchw, 1),
    ((1, 128, 5, 6), (3, 2, 1), 192, nhwc, 1),
    ((3, 64, 9, 12), (2, 1, 1), 8, nhwc, 1),
    ((2, 64, 9, 8), (3, 1, 1), 200, nhwc, 1),
    ((6, 3, 17, 19), (3, 2, 1), 8, nchw, 9),
)


def results(ops, dtype, maps):
    """Results of both operators."""
    for shape, split, outputs, layout, count in maps:
        x, weight, bias, *norm = arguments(shape, split, outputs, True, True, dtype, "cpu")
        # Moments that are not those of rounding: the elements' mean is not zero.
        x = layout(x + 1)
        with multiprocessors(count):
            y = ops.soft_split_linear(x, weight, bias, *norm, *split, 1e-5)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            grads = ops.soft_split_linear_backward(grad, x, weight, *norm, *split, 1e-5, True)
        yield from (y, *grads)


def assert_an_image_does_not_touch_another(ops, case):
    """Results of the operators in ``ops`` for a map of MODELS."""
    channels, split, outputs = MODELS[case]
    x, *rest = arguments((3, channels, 14, 14), split, outputs, True, True, torch.bfloat16, "cpu")
    grad = torch.randn(ops.soft_split_linear(x, *rest, *split, 1e-5).shape).to(x.dtype)
    weight, _, *norm = rest

    def results():
        y = ops.soft_split_linear(x, *rest, *split, 1e-5)
        grad_x, *_ = ops.soft_split_linear_backward(grad, x, weight, *norm, *split, 1e-5, True)
        return [tensor[[0, 2]] for tensor in (y, grad_x)]

    alone = results()
    x[1] = torch.nan
    assert all(map(torch.equal, alone, results()))
