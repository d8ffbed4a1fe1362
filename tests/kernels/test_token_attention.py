"""Softmax token attention in every backend that fuses it: parity, extreme inputs, contracts."""

import pytest
import torch

from t2t_kernels import token_attention
from t2t_kernels.backends import OPERATIONS
from t2t_kernels.library import operators
from tests.kernels.meters import work
from tests.kernels.test_soft_split import name
from tests.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

# B, T, E.
CASES = {
    "usual": (2, 130, 64),
    "narrow": (1, 31, 32),
    "wide": (1, 37, 128),
    "odd": (2, 70, 6),
    "chunks": (1, 1030, 16),
    "one-token": (3, 1, 16),
    "empty-batch": (0, 9, 16),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def fused(backend):
    if backend not in OPERATIONS["token_attention"].kernels:
        pytest.skip(f"no {backend} kernel yet")


def arguments(case, rms, dtype, device):
    """q and k of the given rms, so that the scores' is rms² · √E · scale."""
    torch.manual_seed(len(case))
    return [(torch.randn(CASES[case]) * scale).to(device, dtype) for scale in (rms, rms, 1.0)]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(backend, device, case, dtype, skip_unless_taken):
    skip_unless_taken("token_attention", dtype, E=CASES[case][2])
    assert_parity(arguments(case, 1.0, dtype, device), 147**-0.5, backend)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_large_scores(backend, device, dtype, scale):
    """Scores of rms 64 · 8: nearly one key a query, nothing overflows."""
    assert_parity(arguments("usual", 8.0, dtype, device), scale, backend)


def test_nearly_equal_keys(backend, device):
    """Attention that is uniform but for roundings: nothing is lost where it cancels."""
    q, k, v = arguments("usual", 1.0, torch.float32, device)
    assert_parity([q, k * 1e-3 + 3, v], 64**-0.5, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_finite_for_large_finite_inputs(backend, device, dtype):
    q, k, v = arguments("odd", 200.0, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    y = token_attention(*leaves, scale=1.0, backend=backend)
    assert y.isfinite().all()
    for what, grad in zip("qkv", torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.isfinite().all(), f"gradient of {what}"


def test_views(backend, device):
    """q, k and v as a linear layer's chunks, the gradient as a sum's."""
    qkv = torch.randn(2, 20, 48, device=device, requires_grad=True)

    def grad(backend):
        y = token_attention(*qkv.chunk(3, -1), scale=0.3, backend=backend)
        return torch.autograd.grad(y.sum(), qkv)[0]

    torch.testing.assert_close(grad(backend), grad("reference"), rtol=1e-4, atol=1e-5)


def test_transposed_and_misaligned_views(backend, device):
    storage = torch.randn(3 * 2 * 20 * 16 + 1, device=device)[1:]
    q, k, v = storage.view(3, 2, 16, 20).transpose(2, 3).unbind()
    ours = token_attention(q, k, v, scale=0.3, backend=backend)
    plain = token_attention(q, k, v, scale=0.3, backend="reference")
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_deterministic(backend, device):
    tensors = arguments("usual", 1.0, torch.float32, device)
    first, second = (gradients(tensors, 0.1, backend, torch.float32) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_launches_and_allocations(backend, device):
    """One launch forward and two backward; nothing is larger than the inputs."""
    if backend != "triton":
        pytest.skip("counts Triton's launches")
    torch.use_deterministic_algorithms(False)  # whose poisoning would count
    from t2t_kernels.token_attention import triton as kernels

    tensors = arguments("usual", 1.0, torch.bfloat16, device)
    with work() as forward:
        y, *saved = kernels.token_attention(*tensors, 0.1)
    assert len(forward.launched) == 1, forward.launched
    with work() as backward:
        kernels.token_attention_backward(y, *tensors, *saved, 0.1)
    assert len(backward.launched) == 2, backward.launched
    assert len(forward.allocated) == 4 and len(backward.allocated) == 5
    for tensor in (*forward.allocated, *backward.allocated):
        assert tensor.numel() <= y.numel(), tensor.shape


def test_autocast(backend, device):
    q, k, v = (tensor.requires_grad_() for tensor in arguments("odd", 1.0, torch.float32, device))
    with torch.autocast(device.type, torch.bfloat16):
        y = token_attention(q, k, v, scale=0.4, backend=backend)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().sum(), v)
    assert grad.dtype == torch.float32
    plain = token_attention(q, k, v, scale=0.4, backend=backend)
    torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)


def test_opcheck_and_compile(backend, device):
    leaves = [tensor.requires_grad_() for tensor in arguments("narrow", 1.0, torch.float32, device)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators(backend).token_attention, (*leaves, 0.2), test_utils=tests)

    def step(q, k, v):
        return token_attention(q * 2, k, v, scale=0.2, backend=backend).square().sum()

    compiled, expected = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(expected, leaves)
    )


def test_no_second_derivative(backend, device):
    q, k, v = (tensor.requires_grad_() for tensor in arguments("odd", 1.0, torch.float32, device))
    y = token_attention(q, k, v, scale=0.4, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
