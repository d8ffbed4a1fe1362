"""Performer attention in every backend that fuses it: parity, gradients, extreme inputs, contracts."""

import pytest
import torch

from t2t_kernels import BackendUnavailable, performer_attention
from t2t_kernels.backends import OPERATIONS
from t2t_kernels.library import operators
from tests.support.kernels.performer_attention import CASES, arguments, assert_parity
from tests.support.names import name
from tests.support.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

# With large norms one token's exponent, rounded, decides an error: many images, so that it is not
# the luck of one of them.
MANY_IMAGES = (12, 65, 64, 32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Cases for a property: sizes that need padding, and the models' sizes in half types.
KINDS = {
    "odd-float32": (torch.float32, 8, 5),
    "models-bfloat16": (torch.bfloat16, 64, 32),
    "models-float16": (torch.float16, 64, 32),
}
OPERATION = OPERATIONS["performer_attention"]


@pytest.fixture
def fused(backend):
    if backend not in OPERATION.kernels:
        pytest.skip(f"no {backend} kernel yet")


@pytest.fixture(params=KINDS)
def kind(request, skip_unless_taken):
    """A dtype, E and m that the backend's kernel supports."""
    dtype, embed, features = KINDS[request.param]
    skip_unless_taken("performer_attention", dtype, E=embed, m=features)
    return dtype, embed, features


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(backend, device, case, dtype, skip_unless_taken):
    skip_unless_taken("performer_attention", dtype, E=CASES[case][2], m=CASES[case][3])
    # A larger eps keeps the gradients of a single token's k and q from being all rounding.
    eps = 0.1 if case == "one-token" else 1e-8
    assert_parity(*arguments(CASES[case], 0.5, dtype, device), eps, backend)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("rms", [2.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_large_norms(backend, device, dtype, rms, eps, skip_unless_taken):
    skip_unless_taken("performer_attention", dtype, E=MANY_IMAGES[2], m=MANY_IMAGES[3])
    assert_parity(*arguments(MANY_IMAGES, rms, dtype, device), eps, backend)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(("embed", "features"), [(8, 4), (64, 32)])
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
def test_finite_for_every_finite_input(
    backend, device, dtype, size, embed, features, eps, skip_unless_taken
):
    skip_unless_taken("performer_attention", dtype, E=embed, m=features)
    torch.manual_seed(2)
    k, q = (((torch.rand(2, 9, embed) - 0.5) * 2).double().mul(size).to(dtype) for _ in range(2))
    k[0, 0], q[0, 1] = size, -size
    v, w = torch.randn(2, 9, embed).to(dtype), torch.randn(features, embed, device=device)
    leaves = [tensor.to(device).requires_grad_() for tensor in (k, q, v)]
    y = performer_attention(*leaves, w, eps=eps, backend=backend)
    assert y.isfinite().all()
    for what, grad in zip("kqv", torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.isfinite().all(), f"gradient of {what}"


@pytest.mark.parametrize("which", ["k", "q", "v"])
def test_nan_is_not_clamped_away(backend, device, which, kind):
    """Results that depend on a NaN are NaN, so that a diverged training does not look finite."""
    dtype, embed, features = kind
    torch.manual_seed(3)
    tensors = {name: torch.randn(1, 70, embed, device=device).to(dtype) for name in "kqv"}
    tensors[which][0, 40, 3] = float("nan")
    w = torch.randn(features, embed, device=device)
    ours, plain = (performer_attention(**tensors, w=w, backend=b) for b in (backend, "reference"))
    assert plain.isnan().any()
    assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("features_dtype", [*DTYPES, torch.float64], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_random_features_of_any_dtype(backend, device, dtype, features_dtype, skip_unless_taken):
    """As ``module.bfloat16()`` converts them along with the parameters."""
    sizes = (1, 31, 64, 32)
    skip_unless_taken("performer_attention", dtype, E=sizes[2], m=sizes[3])
    tensors, w = arguments(sizes, 0.5, dtype, device)
    assert_parity(tensors, w.to(features_dtype), 1e-8, backend)


VIEWS = {
    "chunks": lambda kqv: kqv.chunk(3, -1),
    # Of one image after the other, and of elements that lie apart.
    "tokens-first": lambda kqv: kqv.transpose(0, 1).contiguous().transpose(0, 1).chunk(3, -1),
    "elements-apart": lambda kqv: kqv.mT.contiguous().mT.chunk(3, -1),
    # Rows that begin one element off any vector boundary.
    "off-vectors": lambda kqv: torch.nn.functional.pad(kqv, (1, 2))[..., 1:-2].chunk(3, -1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend, device, kind, view):
    """k, q and v as a linear layer's chunks and other views, the gradient as a sum's."""
    dtype, embed, features = kind
    torch.manual_seed(4)
    kqv = torch.randn(2, 20, 3 * embed, device=device).to(dtype)
    w = torch.randn(features, embed, device=device).mul(embed**-0.5).to(dtype)

    def results(backend, dtype):
        leaf = kqv.to(dtype).requires_grad_()
        y = performer_attention(*VIEWS[view](leaf), w.to(dtype), eps=0.0, backend=backend)
        return y, torch.autograd.grad(y.sum(), leaf)[0]

    exact = results("reference", torch.float64)
    for ours, plain, expected in zip(results(backend, dtype), results("reference", dtype), exact):
        assert_as_accurate(ours, plain, expected)


# Backend, dtype, E, m, and what is said.
REFUSED = [
    ("triton", torch.float32, 130, 8, "takes E up to 128, got 130"),
    ("triton", torch.bfloat16, 64, 130, "takes m up to 128, got 130"),
    ("cuda", torch.bfloat16, 130, 32, "takes E = 64, got 130"),
    ("cuda", torch.bfloat16, 63, 32, "takes E = 64, got 63"),
    ("cuda", torch.float16, 64, 31, "takes m = 32, got 31"),
    ("cuda", torch.float32, 64, 32, "takes float16 and bfloat16, got float32"),
]


def test_limits(backend, device):
    refused = [case for case in REFUSED if case[0] == backend]
    if not refused:
        pytest.skip("no limits are listed for this backend")
    for _, dtype, embed, features, reason in refused:
        k = torch.randn(1, 3, embed, device=device).to(dtype)
        w = torch.randn(features, embed, device=device)
        with pytest.raises(BackendUnavailable, match=reason):
            performer_attention(k, k, k, w, backend=backend)


def test_opcheck_and_compile(backend, device, kind):
    dtype, *sizes = kind
    tensors, w = arguments((1, 31, *sizes), 0.5, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
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
