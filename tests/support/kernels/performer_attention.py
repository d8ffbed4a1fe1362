"""Calls of performer_attention and their parity with the reference."""

import math

import torch

from t2t_kernels import performer_attention
from tests.support.parity import assert_as_accurate

# B, T, E, m: those of E = 64 and m = 32, the models' sizes, are all that some kernels take.
CASES = {
    "usual": (2, 65, 64, 32),
    "narrow": (1, 31, 32, 16),
    "wide": (1, 17, 128, 64),
    "many-features": (1, 600, 16, 100),
    "odd": (2, 70, 6, 5),
    "chunks": (1, 1030, 64, 32),
    "one-token": (16, 1, 64, 32),
    "empty-batch": (0, 9, 64, 32),
}


def arguments(sizes, rms, dtype, device):
    batch, tokens, embed, features = sizes
    torch.manual_seed(tokens)
    scales = (rms, rms, 1.0)
    tensors = [(torch.randn(batch, tokens, embed) * scale).to(device, dtype) for scale in scales]
    w = torch.nn.init.orthogonal_(torch.empty(features, embed)) * math.sqrt(features)
    return tensors, w.to(device)


def gradients(tensors, w, eps, backend, dtype):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    w = w.double() if dtype == torch.float64 else w
    y = performer_attention(*leaves, w, eps=eps, backend=backend)
    torch.manual_seed(0)
    grad = torch.randn(y.shape, device=y.device).to(tensors[0].dtype).to(dtype)
    return dict(zip("ykqv", (y, *torch.autograd.grad(y, leaves, grad))))


def assert_parity(tensors, w, eps, backend):
    dtype = tensors[0].dtype
    ours = gradients(tensors, w, eps, backend, dtype)
    plain = gradients(tensors, w, eps, "reference", dtype)
    exact = gradients(tensors, w, eps, "reference", torch.float64)
    for what in exact:
        assert_as_accurate(ours[what], plain[what], exact[what], what)
