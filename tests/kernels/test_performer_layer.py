"""The Performer layer in every backend that fuses it: parity with dropout, launches, memory, contracts."""

import pytest
import torch

from t2t_kernels import (
    BackendUnavailable,
    soft_split_linear,
)
from t2t_kernels.backends import OPERATIONS
from t2t_kernels.library import operators
from t2t_kernels.measure import saved_bytes
from tests.support.devices import DEVICE
from tests.support.kernels.layouts import channels_last, sliced
from tests.support.kernels.meters import work
from tests.support.kernels.params import performer_params
from tests.support.kernels.performer_layer import (
    CASES,
    FIELDS,
    MODELS,
    arguments,
    assert_parity,
    gradients,
    layer,
)
from tests.support.names import name
from tests.support.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Cases for a property: sizes that need padding, and the models' sizes in half types.
KINDS = {
    "odd-float32": ("odd", torch.float32),
    "models-bfloat16": ("models-odd", torch.bfloat16),
    "models-float16": ("models-odd", torch.float16),
}


@pytest.fixture
def fused(backend):
    if backend not in OPERATIONS["performer_layer"].kernels:
        pytest.skip(f"no {backend} kernel yet")


@pytest.fixture
def taken(skip_unless_taken):
    """Skips a case that the backend's kernel does not support."""

    def check(case, dtype):
        (_, channels, *_), (kernel_size, stride, _), sizes = CASES[case]
        split = {"channels": channels, "kernel_size": kernel_size, "stride": stride}
        skip_unless_taken("performer_layer", dtype, **dict(zip("EmM", sizes)), **split)

    return check


@pytest.fixture(params=KINDS)
def kind(request, taken):
    """A case and a dtype that the backend's kernel supports."""
    taken(*KINDS[request.param])
    return KINDS[request.param]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, dtype) for case in CASES if CASES[case][2] == MODELS for dtype in DTYPES[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_parity(backend, device, case, dtype, taken):
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    # With a single token, eps is all that the gradients of k and q come from; with 64 channels and
    # more, the usual one turns the attention off and leaves one exponent's rounding.
    eps = 0.1 if case == "one-token" else 0.0 if CASES[case][2][0] >= 64 else 1e-8
    assert_parity(tensors, split, backend, dropout_p=0.1, seed=2**40 + 5, eps=eps)


@pytest.mark.parametrize("layout", [channels_last, sliced], ids=name)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("narrow", torch.float32),
        ("odd", torch.float32),
        ("models-odd", torch.bfloat16),
        ("models-general", torch.float16),
        ("layer2", torch.bfloat16),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_layouts_without_dropout_and_eps(backend, device, case, dtype, layout, taken):
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    assert_parity(tensors, split, backend, layout, eps=0.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in ("odd", "one-token", "models-odd") for dtype in DTYPES],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_dropout(backend, device, dropout_p, case, dtype, taken):
    """The mask is exactly that of the reference: any wrong bit would be a large error."""
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    seed = torch.tensor([-3], device=device)
    ours = layer(tensors, split, backend, dropout_p=dropout_p, seed=seed)
    plain = layer(tensors, split, "reference", dropout_p=dropout_p, seed=seed)
    close = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(ours, plain, rtol=close, atol=close)


def test_a_seed_of_64_bits_need_not_fit_int64(backend, device, kind):
    tensors, split = arguments(*kind, device)
    signed = layer(tensors, split, backend, dropout_p=0.5, seed=-3)
    for seed in (2**64 - 3, 2**65 - 3):
        assert torch.equal(signed, layer(tensors, split, backend, dropout_p=0.5, seed=seed))


def test_a_seed_is_drawn_if_none_is_given(backend, device, kind):
    tensors, split = arguments(*kind, device)
    torch.manual_seed(3)
    first, second = (layer(tensors, split, backend, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, layer(tensors, split, backend, dropout_p=0.5))


@pytest.mark.parametrize("value", [0.0, 100.0])
def test_flat_map(backend, device, value, kind):
    tensors, split = arguments(*kind, device)
    tensors[0].fill_(value)
    assert_parity(tensors, split, backend)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("narrow", torch.float32),
        # Of few images, the largest error is a matter of luck.
        ("layer2", torch.bfloat16),
        ("layer2", torch.float16),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_large_keys_and_queries(backend, device, case, dtype, eps, taken):
    """k and q with rms 8 and more, for which the published formula is NaN."""
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    tensors[1 + FIELDS.index("kqv_weight")].mul_(8)
    ours = gradients(tensors, split, backend, dtype, eps=eps)
    assert all(value.isfinite().all() for value in ours.values())
    plain = layer(tensors, split, "reference", eps=eps)
    if dtype == torch.float32:
        torch.testing.assert_close(ours["y"], plain, rtol=1e-2, atol=1e-2)
    else:
        exact = layer([tensor.double() for tensor in tensors], split, "reference", eps=eps)
        assert_as_accurate(ours["y"], plain, exact)


@pytest.mark.parametrize("features_dtype", [*DTYPES, torch.float64], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_random_features_of_any_dtype(backend, device, dtype, features_dtype, taken):
    """The result is that of the same values in float32; they receive no gradient."""

    def results(w):
        leaves = [tensor.detach().requires_grad_() for tensor in (tensors[0], w, *tensors[2:])]
        y = layer(leaves, split, backend)
        y.sum().backward()
        assert leaves[1].grad is None
        return [y, leaves[0].grad, *(leaf.grad for leaf in leaves[2:])]

    case = "odd" if dtype == torch.float32 else "models-odd"
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    w = tensors[1].to(torch.float16).to(features_dtype)
    assert all(map(torch.equal, results(w), results(w.float())))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("layer1", torch.float32), ("layer1", torch.bfloat16), ("layer2", torch.float16)],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_deterministic(backend, device, case, dtype, taken):
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    first, second = (
        gradients(tensors, split, backend, dtype, dropout_p=0.1, seed=1) for _ in range(2)
    )
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_autocast(backend, device):
    tensors, split = arguments("models-odd", torch.float32, device)
    x = tensors[0].requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        ours = layer(tensors, split, backend)
    assert ours.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(ours.float().sum(), x)
    assert grad.dtype == torch.float32
    plain = layer(tensors, split, "reference")
    torch.testing.assert_close(ours.float(), plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("which", ["x", "kqv_weight", "mlp_2_bias"])
def test_nan_is_not_lost(backend, device, which, kind):
    """Results that depend on a NaN are NaN, so that a diverged training does not look finite."""
    tensors, split = arguments(*kind, device)
    tensor = tensors[0] if which == "x" else tensors[1 + FIELDS.index(which)]
    tensor.view(-1)[tensor.numel() // 2] = torch.nan
    # In float64: in torch's half-precision products, a NaN can reach the previous row.
    exact = layer([tensor.double() for tensor in tensors], split, "reference")
    assert exact.isnan().any()
    assert torch.equal(layer(tensors, split, backend).isnan(), exact.isnan())


# Backend, dtype, E, m, M, and what is said.
REFUSED = [
    ("triton", torch.float32, (130, 8, 8), "takes E up to 128, got 130"),
    ("triton", torch.bfloat16, (8, 130, 8), "takes m up to 128, got 130"),
    ("triton", torch.bfloat16, (8, 8, 130), "takes M up to 128, got 130"),
    ("cuda", torch.bfloat16, (32, 32, 64), "takes E = 64, got 32"),
    ("cuda", torch.bfloat16, (64, 16, 64), "takes m = 32, got 16"),
    ("cuda", torch.float16, (64, 32, 128), "takes M = 64, got 128"),
    ("cuda", torch.float32, MODELS, "takes float16 and bfloat16, got float32"),
]


def test_limits(backend, device):
    refused = [case for case in REFUSED if case[0] == backend]
    if not refused:
        pytest.skip("no limits are listed for this backend")
    for _, dtype, sizes, reason in refused:
        params = performer_params(12, *sizes, dtype=torch.float32)
        tensors = [torch.randn(1, 3, 4, 4), *params]
        with pytest.raises(BackendUnavailable, match=reason):
            layer([tensor.to(device, dtype) for tensor in tensors], (2, 2, 0), backend)


def test_opcheck(backend, device, kind):
    tensors, split = arguments(*kind, device)
    leaves = [tensors[0].requires_grad_(), tensors[1]]
    leaves += [tensor.requires_grad_() for tensor in tensors[2:]]
    seed = torch.tensor([4], device=device)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(
        operators(backend).performer_layer, (*leaves, seed, *split, 1e-8, 0.1), test_utils=tests
    )


def test_compile(backend, device, kind):
    tensors, split = arguments(*kind, device)
    x = tensors[0].requires_grad_()

    def step(x, seed):
        return layer([x * 2, *tensors[1:]], split, backend, dropout_p=0.2, seed=seed).square().sum()

    seed = torch.tensor([11], device=device)
    compiled, expected = torch.compile(step, fullgraph=True)(x, seed), step(x, seed)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(expected, x))


def test_launches_and_allocations(backend, device):
    """At most 7 launches forward, 19 backward, 17 without the map's gradient; forward, nothing per token but
    the result and k, q and v, side by side; backward, nothing larger."""
    if backend != "triton":
        pytest.skip("counts Triton's launches")
    torch.use_deterministic_algorithms(False)  # whose poisoning would count
    from t2t_kernels.performer_layer import triton as kernels

    tensors, split = arguments("layer2", torch.float32, device)
    tensors[0] = channels_last(tensors[0])
    seed = torch.tensor([4], device=device)
    with work() as forward:
        y, *sums = kernels.performer_layer(*tensors, seed, *split, 1e-8, 0.1)
    assert len(forward.launched) <= 7, forward.launched
    with work() as backward:
        kernels.performer_layer_backward(y, *tensors, seed, *sums, *split, 1e-8, 0.1, True)
    assert len(backward.launched) <= 19, backward.launched
    with work() as without_x:
        kernels.performer_layer_backward(y, *tensors, seed, *sums, *split, 1e-8, 0.1, False)
    assert len(without_x.launched) <= 17, without_x.launched
    tokens = y.shape[1]
    assert len(forward.allocated) > 4, "the meter sees too little"
    per_token = [tensor.shape for tensor in forward.allocated if tokens in tensor.shape]
    assert sorted(shape[2] for shape in per_token) == [y.shape[2], 3 * y.shape[2]], per_token
    for tensor in (*backward.allocated, *without_x.allocated):
        assert tokens not in tensor.shape or tensor.numel() <= 3 * y.numel(), tensor.shape


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.0), (torch.bfloat16, 1.0)])
def test_saved_for_backward(backend, dtype, most, skip_unless_taken):
    """MiB per image for the whole module at 224×224, from shapes; no kernel runs."""
    skip_unless_taken("performer_layer", dtype, **dict(zip("EmM", MODELS)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = 4
    with FakeTensorMode():
        x = torch.empty(batch, 3, 224, 224, dtype=dtype, device=DEVICE)
        params = []

        def leaf(*shape):
            params.append(torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=True))
            return params[-1]

        def module(x):
            for split, width, side in (((7, 4, 2), 147, 56), ((3, 2, 1), 576, 28)):
                e = [leaf(64) for _ in range(5)]
                layer_params = [leaf(32, 64), leaf(width), leaf(width), leaf(192, width), leaf(192)]
                layer_params += [leaf(64, 64), *e[:3], leaf(64, 64), e[3], leaf(64, 64), e[4]]
                seed = torch.empty(1, dtype=torch.int64, device=DEVICE)
                y = layer([x, *layer_params], split, backend, dropout_p=0.1, seed=seed)
                x = y.transpose(1, 2).unflatten(2, (side, side))
            split = {"kernel_size": 3, "stride": 2, "padding": 1}
            return soft_split_linear(x, leaf(384, 576), leaf(384), **split, backend=backend)

        saved = saved_bytes(lambda: module(x), apart=params) / batch / 2**20
    assert most / 4 <= saved <= most, "a quarter: the meter would see too little"
