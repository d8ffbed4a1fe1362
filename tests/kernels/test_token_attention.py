"""Softmax token attention in every backend that fuses it: parity, extreme inputs, contracts."""

import pytest
import torch

from t2t_kernels import BackendUnavailable, token_attention
from t2t_kernels.backends import OPERATIONS
from t2t_kernels.library import operators
from tests.support.kernels.meters import work
from tests.support.kernels.token_attention import CASES, arguments, assert_parity, gradients
from tests.support.names import name
from tests.support.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Cases for a property: a size that needs padding, and the models' size in half types.
KINDS = {
    "odd-float32": (torch.float32, 6),
    "models-bfloat16": (torch.bfloat16, 64),
    "models-float16": (torch.float16, 64),
}
OPERATION = OPERATIONS["token_attention"]


@pytest.fixture
def fused(backend):
    if backend not in OPERATION.kernels:
        pytest.skip(f"no {backend} kernel yet")


@pytest.fixture(params=KINDS)
def kind(request, skip_unless_taken):
    """A dtype and E that the backend's kernel supports."""
    dtype, embed = KINDS[request.param]
    skip_unless_taken("token_attention", dtype, E=embed)
    return dtype, embed


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(backend, device, case, dtype, skip_unless_taken):
    skip_unless_taken("token_attention", dtype, E=CASES[case][2])
    assert_parity(arguments(CASES[case], 1.0, dtype, device), 147**-0.5, backend)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_large_scores(backend, device, dtype, scale, skip_unless_taken):
    """Scores with rms 64 · 8: nearly one key per query, and nothing overflows."""
    skip_unless_taken("token_attention", dtype, E=64)
    assert_parity(arguments(CASES["usual"], 8.0, dtype, device), scale, backend)


def test_nearly_equal_keys(backend, device, skip_unless_taken):
    """Attention that is uniform up to rounding: cancellation does not lose precision."""
    skip_unless_taken("token_attention", torch.float32, E=64)
    q, k, v = arguments(CASES["usual"], 1.0, torch.float32, device)
    assert_parity([q, k * 1e-3 + 3, v], 64**-0.5, backend)


def test_finite_for_large_finite_inputs(backend, device, kind):
    dtype, embed = kind
    q, k, v = arguments((2, 70, embed), 200.0, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    y = token_attention(*leaves, scale=1.0, backend=backend)
    assert y.isfinite().all()
    for what, grad in zip("qkv", torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.isfinite().all(), f"gradient of {what}"


def test_first_keys_without_weight(backend, device, kind):
    """Scores of −infinity in whole tiles of keys, and for one query in all of them."""
    dtype, embed = kind
    q, k, v = arguments((1, 600, embed), 1.0, dtype, device)
    q[:, :, 0] = 1
    k[:, :530, 0] = -torch.inf
    q[:, 5] = 0
    ours = token_attention(q, k, v, scale=0.5, backend=backend)
    exact = [tensor.double() for tensor in (q, k, v)]
    exact = token_attention(*exact, scale=0.5, backend="reference")
    assert exact.isnan().any(-1).nonzero().tolist() == [[0, 5]]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True)


# Of (B, T, 3E) elements: a linear layer's chunks, columns as rows, rows off 16-byte boundaries.
VIEWS = {
    "chunks": lambda qkv: qkv.chunk(3, -1),
    "transposed": lambda qkv: [x.reshape(2, -1, 20).mT for x in qkv.chunk(3, -1)],
    "misaligned": lambda qkv: [
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in qkv.chunk(3, -1)
    ],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend, device, kind, view):
    """The gradient is a sum's."""
    dtype, embed = kind
    torch.manual_seed(4)
    qkv = torch.randn(2, 20, 3 * embed, device=device).to(dtype)

    def results(backend, dtype):
        leaf = qkv.to(dtype).requires_grad_()
        y = token_attention(*VIEWS[view](leaf), scale=0.3, backend=backend)
        return y, torch.autograd.grad(y.sum(), leaf)[0]

    exact = results("reference", torch.float64)
    for ours, plain, expected in zip(
        results(backend, dtype), results("reference", dtype), exact, strict=True
    ):
        assert_as_accurate(ours, plain, expected)


def test_deterministic(backend, device, kind):
    dtype, embed = kind
    tensors = arguments((2, 130, embed), 1.0, dtype, device)
    first, second = (gradients(tensors, 0.1, backend, dtype) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


# Backend, dtype, E, and what is said.
REFUSED = [
    ("triton", torch.float32, 130, "takes E up to 128, got 130"),
    ("cuda", torch.bfloat16, 65, "takes E = 64, got 65"),
    ("cuda", torch.float16, 63, "takes E = 64, got 63"),
    ("cuda", torch.float32, 64, "takes float16 and bfloat16, got float32"),
]


def test_limits(backend, device):
    refused = [case for case in REFUSED if case[0] == backend]
    if not refused:
        pytest.skip("no limits are listed for this backend")
    for _, dtype, embed, reason in refused:
        q = torch.randn(1, 3, embed, device=device).to(dtype)
        with pytest.raises(BackendUnavailable, match=reason):
            token_attention(q, q, q, scale=1.0, backend=backend)


def test_launches_and_allocations(backend, device):
    """One launch forward and two backward; nothing is larger than the inputs."""
    if backend != "triton":
        pytest.skip("counts Triton's launches")
    torch.use_deterministic_algorithms(False)  # whose poisoning would count
    from t2t_kernels.token_attention import triton as kernels

    tensors = arguments(CASES["usual"], 1.0, torch.bfloat16, device)
    with work() as forward:
        y, *saved = kernels.token_attention(*tensors, 0.1)
    assert len(forward.launched) == 1, forward.launched
    with work() as backward:
        kernels.token_attention_backward(y, *tensors, *saved, 0.1)
    assert len(backward.launched) == 2, backward.launched
    assert len(forward.allocated) == 4 and len(backward.allocated) == 4
    for tensor in (*forward.allocated, *backward.allocated):
        assert tensor.numel() <= y.numel(), tensor.shape


def test_autocast(backend, device):
    tensors = arguments(CASES["usual"], 1.0, torch.float32, device)
    q, k, v = (tensor.requires_grad_() for tensor in tensors)
    with torch.autocast(device.type, torch.bfloat16):
        y = token_attention(q, k, v, scale=0.4, backend=backend)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.float().sum(), v)
    assert grad.dtype == torch.float32
    plain = token_attention(q, k, v, scale=0.4, backend="reference")
    torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)


def test_opcheck_and_compile(backend, device, kind):
    dtype, embed = kind
    tensors = arguments((1, 31, embed), 1.0, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(operators(backend).token_attention, (*leaves, 0.2), test_utils=tests)

    def step(q, k, v):
        return token_attention(q * 2, k, v, scale=0.2, backend=backend).square().sum()

    compiled, expected = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(expected, leaves)
    )


def test_no_second_derivative(backend, device, kind):
    dtype, embed = kind
    tensors = arguments((2, 70, embed), 1.0, dtype, device)
    q, k, v = (tensor.requires_grad_() for tensor in tensors)
    y = token_attention(q, k, v, scale=0.4, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
