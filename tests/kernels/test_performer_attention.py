"""Performer attention in every backend that fuses it: parity, gradients, extreme inputs, contracts."""

import math

import pytest
import torch

from t2t_kernels import BackendUnavailable, performer_attention
from t2t_kernels.backends import OPERATIONS
from t2t_kernels.library import operators
from tests.kernels.test_soft_split import name
from tests.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

# B, T, E, m.
CASES = {
    "usual": (2, 65, 64, 32),
    "narrow": (1, 31, 32, 16),
    "wide": (1, 17, 128, 64),
    "many-features": (1, 600, 16, 100),
    "odd": (2, 70, 6, 5),
    "chunks": (1, 1030, 16, 8),
    "one-token": (16, 1, 16, 16),
    "empty-batch": (0, 9, 16, 8),
}
# With large norms one token's exponent, rounded, decides an error: many images, so that it is not
# the luck of one of them.
MANY_IMAGES = (12, 65, 64, 32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = OPERATIONS["performer_attention"].limits


@pytest.fixture
def fused(backend):
    if backend not in OPERATIONS["performer_attention"].kernels:
        pytest.skip(f"no {backend} kernel yet")


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


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(backend, device, case, dtype):
    if max(CASES[case][2:]) > LIMITS.get(backend, {}).get("E", 128):
        pytest.skip("larger than its kernel takes")
    # A larger eps keeps the gradients of a single token's k and q from being all rounding.
    eps = 0.1 if case == "one-token" else 1e-8
    assert_parity(*arguments(CASES[case], 0.5, dtype, device), eps, backend)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("rms", [2.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_large_norms(backend, device, dtype, rms, eps):
    assert_parity(*arguments(MANY_IMAGES, rms, dtype, device), eps, backend)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 100.0),
        (torch.float32, 1e18),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 6e4),
    ],
)
def test_finite_for_every_finite_input(backend, device, dtype, size, eps):
    torch.manual_seed(2)
    k, q = (((torch.rand(2, 9, 8) - 0.5) * 2).double().mul(size).to(dtype) for _ in range(2))
    k[0, 0], q[0, 1] = size, -size
    v, w = torch.randn(2, 9, 8).to(dtype), torch.randn(4, 8, device=device)
    leaves = [tensor.to(device).requires_grad_() for tensor in (k, q, v)]
    y = performer_attention(*leaves, w, eps=eps, backend=backend)
    assert y.isfinite().all()
    for what, grad in zip("kqv", torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.isfinite().all(), f"gradient of {what}"


@pytest.mark.parametrize("which", ["k", "q", "v"])
def test_nan_is_not_clamped_away(backend, device, which):
    """What a NaN reaches is NaN: a diverged training must not look like a finite one."""
    torch.manual_seed(3)
    tensors = {name: torch.randn(1, 70, 8, device=device) for name in "kqv"}
    tensors[which][0, 40, 3] = float("nan")
    w = torch.randn(5, 8, device=device)
    ours, plain = (performer_attention(**tensors, w=w, backend=b) for b in (backend, "reference"))
    assert plain.isnan().any()
    assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("features_dtype", [*DTYPES, torch.float64], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_random_features_of_any_dtype(backend, device, dtype, features_dtype):
    """As ``module.bfloat16()`` converts them along with the parameters."""
    tensors, w = arguments(CASES["narrow"], 0.5, dtype, device)
    assert_parity(tensors, w.to(features_dtype), 1e-8, backend)


def test_views(backend, device):
    """k, q and v as a linear layer's chunks, the gradient as a sum's."""
    kqv = torch.randn(2, 20, 48, device=device, requires_grad=True)
    w = torch.randn(8, 16, device=device)

    def grad(backend):
        y = performer_attention(*kqv.chunk(3, -1), w, eps=0.0, backend=backend)
        return torch.autograd.grad(y.sum(), kqv)[0]

    torch.testing.assert_close(grad(backend), grad("reference"), rtol=1e-4, atol=1e-5)


def test_limits(backend, device):
    if backend not in LIMITS:
        pytest.skip("its kernel takes any size")
    k = torch.randn(1, 3, 130, device=device)
    w = torch.randn(8, 130, device=device)
    with pytest.raises(BackendUnavailable, match=f"takes E up to {LIMITS[backend]['E']}, got 130"):
        performer_attention(k, k, k, w, backend=backend)


def test_opcheck_and_compile(backend, device):
    tensors, w = arguments(CASES["narrow"], 0.5, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        operators(backend).performer_attention, (*leaves, w, 1e-8), test_utils=tests
    )

    def step(k, q, v):
        return performer_attention(k * 2, q, v, w, backend=backend).square().sum()

    compiled, expected = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(expected, leaves)
    )
