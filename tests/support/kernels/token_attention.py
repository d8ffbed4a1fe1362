"""Calls of token_attention and their parity with the reference."""

import torch

from t2t_kernels import token_attention
from tests.support.parity import assert_as_accurate

# B, T, E; E = 64, the models' size, is all that some kernels take.
CASES = {
    "usual": (2, 130, 64),
    "narrow": (1, 31, 32),
    "wide": (1, 37, 128),
    "odd": (2, 70, 6),
    "chunks": (1, 1030, 64),
    "one-token": (3, 1, 64),
    "empty-batch": (0, 9, 64),
}


def arguments(sizes, rms, dtype, device):
    """q and k with the given rms, so that the scores have rms² · √E · scale."""
    torch.manual_seed(sizes[1])
    return [(torch.randn(sizes) * scale).to(device, dtype) for scale in (rms, rms, 1.0)]


def gradients(tensors, scale, backend, dtype):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    y = token_attention(*leaves, scale=scale, backend=backend)
    torch.manual_seed(0)
    grad = torch.randn(y.shape, device=y.device).to(tensors[0].dtype).to(dtype)
    return dict(zip("yqkv", (y, *torch.autograd.grad(y, leaves, grad)), strict=True))


def assert_parity(tensors, scale, backend):
    dtype = tensors[0].dtype
    ours = gradients(tensors, scale, backend, dtype)
    plain = gradients(tensors, scale, "reference", dtype)
    exact = gradients(tensors, scale, "reference", torch.float64)
    for what in exact:
        if exact["y"].shape[1] == 1 and what in "qk":
            # A single token's score has no gradient; what cancels to it was as large as y·dy.
            assert ours[what].abs().max() <= 64 * torch.finfo(dtype).eps
            continue
        assert_as_accurate(ours[what], plain[what], exact[what], what)
