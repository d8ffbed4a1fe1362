"""Calls of token_attention's CUDA source that its tests and those for Hopper share."""

import torch

from t2t_kernels import token_attention

# B, T, E, each for a path of the kernels, which take E = 64.
CASES = {
    "warps-without-rows": (2, 65, 64),
    "several-blocks-of-an-image": (2, 201, 64),
    "part-of-a-tile": (3, 33, 64),
    "whole-tiles": (1, 128, 64),
    "as-many-tiles-as-stages": (1, 190, 64),
    "one-of-each": (2, 3, 64),
}


def arguments(sizes, rms, dtype):
    torch.manual_seed(sizes[1])
    return [(torch.randn(sizes) * scale).to(dtype) for scale in (rms, rms, 1.0)]


def beside_nan(tensor):
    """The same tokens, with a token of NaN after the last one of each image."""
    images, tokens, embed = tensor.shape
    wider = tensor.new_full((images, tokens + 1, embed), torch.nan)
    wider[:, :tokens] = tensor
    return wider[:, :tokens]


def results(ops, dtype):
    """Results of both operators for tokens that cover most paths of every kernel."""
    for sizes, rms, scale in (((2, 201, 64), 2.0, 0.5), ((1, 65, 64), 1.0, -0.3)):
        q, k, v = (beside_nan(tensor) for tensor in arguments(sizes, rms, dtype))
        # Far below the score of a key that is not there.
        q[0, :, 0], k[0, :, 0] = 20, -20 if scale > 0 else 20
        y, *saved = ops.token_attention(q, k, v, scale)
        yield from (y, *saved)
        torch.manual_seed(0)
        grad = torch.randn(sizes).to(dtype)
        yield from ops.token_attention_backward(grad, q, k, v, *saved, scale)


def attend(tensors, backend):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = token_attention(*leaves, scale=0.5, backend=backend)
    return y, *torch.autograd.grad(y.sum(), leaves)


def assert_scores_may_be_minus_infinity(dtype):
    """Keys without weight: all of the first tile, and all keys of one query."""
    q, k, v = arguments((1, 90, 64), 1.0, dtype)
    q[:, :, 0] = 1
    k[:, :70, 0] = -torch.inf
    q[:, 5] = 0
    ours, plain = (token_attention(q, k, v, scale=0.5, backend=b) for b in ("cuda", "reference"))
    assert torch.equal(ours.isnan(), plain.isnan()) and not ours[:, :5].isnan().any()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_nan_goes_where_the_reference_lets_it(dtype, which):
    """A NaN in q, k or v (0, 1 or 2)."""
    tensors = arguments((2, 70, 64), 1.0, dtype)
    tensors[which][1, 66, 3] = torch.nan
    for ours, plain in zip(attend(tensors, "cuda"), attend(tensors, "reference"), strict=True):
        assert torch.equal(ours.isnan(), plain.isnan())
