"""Calls of soft_split_linear and their parity with the reference."""

import torch

from t2t_kernels import soft_split_linear
from tests.support.kernels.layouts import contiguous
from tests.support.parity import assert_as_accurate

# Map, kernel_size, stride, padding, outputs: the model's splits on small maps, then awkward ones.
CASES = {
    "layer1": ((2, 3, 23, 18), (7, 4, 2), 72),
    "layer2": ((1, 64, 9, 7), (3, 2, 1), 136),
    "one-token": ((1, 5, 3, 3), (3, 2, 0), 7),
    "stride-over-kernel": ((2, 3, 17, 11), (2, 5, 0), 9),
    "padding-over-kernel": ((1, 20, 4, 5), (2, 1, 3), 70),
    "wide-reach": ((1, 2, 9, 8), (5, 1, 2), 5),
    "empty-batch": ((0, 3, 16, 16), (7, 4, 2), 8),
}


def arguments(shape, split, outputs, norm, bias, dtype, device):
    """Map and parameters with the same values in float64 and in ``dtype``."""
    torch.manual_seed(outputs)
    width = shape[1] * split[0] ** 2
    tensors = [torch.randn(shape), torch.randn(outputs, width) * width**-0.5]
    tensors.append(torch.randn(outputs) if bias else None)
    tensors += [1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)] if norm else [None, None]
    return [None if t is None else t.to(device, dtype) for t in tensors]


def gradients(tensors, split, backend, dtype, layout=contiguous):
    """Result and gradients of a call in ``dtype``."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    leaves[0] = layout(leaves[0].detach()).requires_grad_()
    kernel_size, stride, padding = split
    y = soft_split_linear(
        *leaves, kernel_size=kernel_size, stride=stride, padding=padding, backend=backend
    )
    torch.manual_seed(0)
    grad = torch.randn(y.shape, device=y.device).to(tensors[0].dtype).to(dtype)
    asked = [leaf for leaf in leaves if leaf is not None]
    names = ("x", "weight", "bias", "gain", "offset")
    return {"y": y, **dict(zip(names, torch.autograd.grad(y, asked, grad)))}


def assert_parity(tensors, split, backend, layout=contiguous):
    dtype = tensors[0].dtype
    ours = gradients(tensors, split, backend, dtype, layout)
    plain = gradients(tensors, split, "reference", dtype, layout)
    exact = gradients(tensors, split, "reference", torch.float64, layout)
    for what in exact:
        assert_as_accurate(ours[what], plain[what], exact[what], what)
    return ours
