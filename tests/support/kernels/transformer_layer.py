"""Calls of transformer_layer and their parity with the reference."""

import torch

from t2t_kernels import TransformerLayerParams, transformer_layer
from tests.support.kernels.layouts import contiguous
from tests.support.kernels.params import transformer_params
from tests.support.parity import assert_as_accurate

# E, M: all that some kernels take.
MODELS = (64, 64)


# Map, (kernel_size, stride, padding), (E, M): the model's layers on small maps, then awkward ones.
CASES = {
    "layer1": ((1, 3, 26, 21), (7, 4, 2), (64, 64)),
    "layer2": ((1, 64, 12, 9), (3, 2, 1), (64, 64)),
    "narrow": ((1, 20, 7, 6), (3, 2, 1), (32, 40)),
    "wide": ((1, 16, 5, 6), (3, 1, 1), (128, 128)),
    "odd": ((2, 3, 9, 8), (5, 2, 2), (6, 7)),
    # Where scores are large, the rounding of one decides an error: many, so that it is not luck.
    "many": ((8, 20, 24, 24), (3, 2, 1), (32, 40)),
    "many-of-the-models": ((8, 20, 24, 24), (3, 2, 1), MODELS),
    "models-odd": ((2, 3, 9, 8), (5, 2, 2), MODELS),
    "models-general": ((2, 20, 7, 6), (3, 2, 1), MODELS),
    "bands": ((2, 3, 15, 41), (2, 1, 0), (16, 16)),
    "one-token": ((2, 3, 5, 5), (7, 4, 2), MODELS),
    "empty-batch": ((0, 3, 16, 16), (7, 4, 2), MODELS),
}


FIELDS = ("x", *TransformerLayerParams._fields)


def arguments(case, dtype, device):
    shape, split, sizes = CASES[case]
    torch.manual_seed(len(case))
    params = transformer_params(shape[1] * split[0] ** 2, *sizes, dtype=torch.float32)
    return [tensor.to(device, dtype) for tensor in (torch.randn(shape), *params)], split


def layer(tensors, split, backend, scale=None):
    kernel_size, stride, padding = split
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    x, params = tensors[0], TransformerLayerParams(*tensors[1:])
    scale = (x.shape[1] * kernel_size**2) ** -0.5 if scale is None else scale
    return transformer_layer(x, params, **geometry, scale=scale, backend=backend)


def gradients(tensors, split, backend, dtype, layout=contiguous, scale=None):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    leaves[0] = layout(leaves[0].detach()).requires_grad_()
    y = layer(leaves, split, backend, scale)
    torch.manual_seed(0)
    grad = torch.randn(y.shape, device=y.device).to(tensors[0].dtype).to(dtype)
    return {"y": y, **dict(zip(FIELDS, torch.autograd.grad(y, leaves, grad), strict=True))}


def assert_parity(tensors, split, backend, layout=contiguous, scale=None):
    dtype = tensors[0].dtype
    ours = gradients(tensors, split, backend, dtype, layout, scale)
    plain = gradients(tensors, split, "reference", dtype, layout, scale)
    exact = gradients(tensors, split, "reference", torch.float64, layout, scale)
    for what in exact:
        assert_as_accurate(ours[what], plain[what], exact[what], what)
