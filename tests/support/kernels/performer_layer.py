"""Calls of performer_layer and their parity with the reference."""

import torch

from t2t_kernels import PerformerLayerParams, performer_layer
from tests.support.kernels.layouts import contiguous
from tests.support.kernels.params import performer_params
from tests.support.parity import assert_as_accurate

# E, m, M: all that some kernels take.
MODELS = (64, 32, 64)


# Map, kernel_size, stride, padding, and E, m, M: the model's layers on small maps, then awkward ones.
CASES = {
    "layer1": ((1, 3, 26, 21), (7, 4, 2), (64, 32, 64)),
    # Several images: of one, the largest error of the map's gradient is a matter of luck.
    "layer2": ((4, 64, 12, 9), (3, 2, 1), (64, 32, 64)),
    "narrow": ((1, 20, 7, 6), (3, 2, 1), (32, 16, 40)),
    "wide": ((1, 16, 5, 6), (3, 1, 1), (128, 64, 128)),
    "many-features": ((1, 3, 9, 8), (5, 2, 2), (6, 100, 7)),
    "odd": ((2, 3, 9, 8), (5, 2, 2), (6, 5, 7)),
    "models-odd": ((2, 3, 9, 8), (5, 2, 2), (64, 32, 64)),
    "models-general": ((2, 20, 7, 6), (3, 2, 1), (64, 32, 64)),
    "one-token": ((2, 3, 5, 5), (7, 4, 2), (64, 32, 64)),
    "empty-batch": ((0, 3, 16, 16), (7, 4, 2), (64, 32, 64)),
}


FIELDS = ("x", *PerformerLayerParams._fields[1:])


def arguments(case, dtype, device):
    shape, split, sizes = CASES[case]
    torch.manual_seed(len(case))
    width = shape[1] * split[0] ** 2
    params = performer_params(width, *sizes, dtype=torch.float32)
    # Random features of the model's length, √m.
    params.w.mul_((sizes[1] / sizes[0]) ** 0.5)
    return [tensor.to(device, dtype) for tensor in (torch.randn(shape), *params)], split


def layer(tensors, split, backend, **options):
    kernel_size, stride, padding = split
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    params = PerformerLayerParams(*tensors[1:])
    return performer_layer(tensors[0], params, **geometry, backend=backend, **options)


def gradients(tensors, split, backend, dtype, layout=contiguous, **options):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    leaves[0] = layout(leaves[0].detach()).requires_grad_()
    y = layer(leaves, split, backend, **options)
    torch.manual_seed(0)
    grad = torch.randn(y.shape, device=y.device).to(tensors[0].dtype).to(dtype)
    grads = torch.autograd.grad(y, [leaves[0], *leaves[2:]], grad)
    return {"y": y, **dict(zip(FIELDS, grads, strict=True))}


def assert_parity(tensors, split, backend, layout=contiguous, **options):
    dtype = tensors[0].dtype
    ours = gradients(tensors, split, backend, dtype, layout, **options)
    plain = gradients(tensors, split, "reference", dtype, layout, **options)
    exact = gradients(tensors, split, "reference", torch.float64, layout, **options)
    for what in exact:
        assert_as_accurate(ours[what], plain[what], exact[what], what)
    return ours
