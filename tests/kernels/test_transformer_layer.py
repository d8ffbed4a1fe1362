"""The transformer layer in every backend that fuses it: parity, allocations, memory, contracts."""

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
from tests.support.kernels.params import transformer_params
from tests.support.kernels.transformer_layer import (
    CASES,
    FIELDS,
    MODELS,
    arguments,
    assert_parity,
    gradients,
    layer,
)
from tests.support.names import name

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Cases for a property: sizes that need padding, and the models' sizes in half types.
KINDS = {
    "narrow-float32": ("narrow", torch.float32),
    "models-bfloat16": ("models-odd", torch.bfloat16),
    "models-float16": ("models-general", torch.float16),
}


@pytest.fixture
def fused(backend):
    if backend not in OPERATIONS["transformer_layer"].kernels:
        pytest.skip(f"no {backend} kernel yet")


@pytest.fixture
def taken(skip_unless_taken):
    """Skips a case that the backend's kernel does not support."""

    def check(case, dtype):
        (_, channels, *_), (kernel_size, stride, _), sizes = CASES[case]
        split = {"channels": channels, "kernel_size": kernel_size, "stride": stride}
        skip_unless_taken("transformer_layer", dtype, **dict(zip("EM", sizes)), **split)

    return check


@pytest.fixture(params=KINDS)
def kind(request, taken):
    """A case and a dtype that the backend's kernel supports."""
    taken(*KINDS[request.param])
    return KINDS[request.param]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES if not case.startswith("many")),
        *(
            (case, dtype)
            for case in CASES
            if CASES[case][2] == MODELS and not case.startswith("many")
            for dtype in DTYPES[1:]
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_parity(backend, device, case, dtype, taken):
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    assert_parity(tensors, split, backend)


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
def test_layouts(backend, device, case, dtype, layout, taken):
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    assert_parity(tensors, split, backend, layout)


@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
def test_flat_map(backend, device, value, kind):
    tensors, split = arguments(*kind, device)
    tensors[0].fill_(value)
    assert_parity(tensors, split, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_large_scores(backend, device, dtype, taken):
    """q and k with rms 8 and scale 1: nearly one key per query."""
    case = "many" if dtype == torch.float32 else "many-of-the-models"
    taken(case, dtype)
    tensors, split = arguments(case, dtype, device)
    if backend == "triton" and device.type == "cpu":
        tensors[0] = tensors[0][:4]  # its interpreter takes seconds for each
    weight = tensors[FIELDS.index("attn_qkv_weight")]
    weight[: 2 * weight.shape[0] // 3].mul_(8)
    assert_parity(tensors, split, backend, scale=1.0)


def test_no_gradient_of_the_map_if_it_is_not_needed(backend, device, kind):
    (_, dtype), (tensors, split) = kind, arguments(*kind, device)
    leaves = [tensors[0], *(tensor.requires_grad_() for tensor in tensors[1:])]
    with_x = gradients(tensors, split, backend, dtype)
    torch.manual_seed(0)
    y = layer(leaves, split, backend)
    grads = torch.autograd.grad(y, leaves[1:], torch.randn(y.shape, device=y.device).to(dtype))
    for what, grad in zip(FIELDS[1:], grads, strict=True):
        torch.testing.assert_close(grad, with_x[what], rtol=1e-5, atol=1e-5)


def test_deterministic(backend, device, kind):
    (_, dtype), (tensors, split) = kind, arguments(*kind, device)
    first, second = (gradients(tensors, split, backend, dtype) for _ in range(2))
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


@pytest.mark.parametrize("which", ["x", "attn_qkv_weight", "mlp_fc2_bias"])
def test_nan_is_not_lost(backend, device, which, kind):
    """Results that depend on a NaN are NaN, so that a diverged training does not look finite."""
    tensors, split = arguments(*kind, device)
    tensor = tensors[FIELDS.index(which)]
    tensor.view(-1)[tensor.numel() // 2] = torch.nan
    # In float64: in torch's half-precision products, a NaN can reach the previous row.
    exact = layer([tensor.double() for tensor in tensors], split, "reference")
    assert exact.isnan().any()
    assert torch.equal(layer(tensors, split, backend).isnan(), exact.isnan())


# Backend, dtype, E, M, and what is said.
REFUSED = [
    ("triton", torch.float32, (130, 8), "takes E up to 128, got 130"),
    ("triton", torch.bfloat16, (8, 130), "takes M up to 128, got 130"),
    ("cuda", torch.bfloat16, (32, 64), "takes E = 64, got 32"),
    ("cuda", torch.float16, (64, 128), "takes M = 64, got 128"),
    ("cuda", torch.float32, MODELS, "takes float16 and bfloat16, got float32"),
]


def test_limits(backend, device):
    refused = [case for case in REFUSED if case[0] == backend]
    if not refused:
        pytest.skip("no limits are listed for this backend")
    for _, dtype, sizes, reason in refused:
        tensors = [torch.randn(1, 3, 4, 4), *transformer_params(12, *sizes, dtype=torch.float32)]
        with pytest.raises(BackendUnavailable, match=reason):
            layer([tensor.to(device, dtype) for tensor in tensors], (2, 2, 0), backend)


def test_opcheck(backend, device, kind):
    tensors, split = arguments(*kind, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(
        operators(backend).transformer_layer, (*leaves, *split, 0.1), test_utils=tests
    )


def test_compile(backend, device, kind):
    tensors, split = arguments(*kind, device)
    x = tensors[0].requires_grad_()

    def step(x):
        return layer([x * 2, *tensors[1:]], split, backend).square().sum()

    compiled, expected = torch.compile(step, fullgraph=True)(x), step(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(expected, x))


def test_launches_and_allocations(backend, device):
    """At most 4 launches forward and 15 backward; nothing is as large as the tokens or the scores: T×3E at
    most, which are q, k and v side by side and their gradients."""
    if backend != "triton":
        pytest.skip("counts Triton's launches")
    torch.use_deterministic_algorithms(False)  # whose poisoning would count
    from t2t_kernels.transformer_layer import triton as kernels

    tensors, split = arguments("layer2", torch.float32, device)
    tensors[0] = channels_last(tensors[0])
    numbers = *split, 576**-0.5
    with work() as forward:
        y, *saved = kernels.transformer_layer(*tensors, *numbers)
    assert 3 <= len(forward.launched) <= 4, forward.launched
    with work() as backward:
        kernels.transformer_layer_backward(y, *tensors, *saved, *numbers, True)
    assert 6 <= len(backward.launched) <= 15, backward.launched
    tokens, largest = y.shape[1], 3 * y.numel()
    assert len(forward.allocated) >= 5 and len(backward.allocated) >= 12, (
        "the meter sees too little"
    )
    for tensor in (*forward.allocated, *backward.allocated):
        assert tokens not in tensor.shape or tensor.numel() <= largest, tensor.shape


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5.0), (torch.bfloat16, 3.5)])
def test_saved_for_backward(backend, dtype, most, skip_unless_taken):
    """MiB per image for the whole module at 224×224, from shapes; no kernel runs."""
    skip_unless_taken("transformer_layer", dtype, **dict(zip("EM", MODELS)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, device = 4, torch.device("cpu") if backend == "cpu" else DEVICE
    with FakeTensorMode():
        x = torch.empty(batch, 3, 224, 224, dtype=dtype, device=device)
        params = []

        def leaf(*shape):
            params.append(torch.empty(shape, dtype=dtype, device=device, requires_grad=True))
            return params[-1]

        def module(x):
            for split, width, side in (((7, 4, 2), 147, 56), ((3, 2, 1), 576, 28)):
                shapes = ((width,), (width,), (192, width), (64, 64), (64,), (64,), (64,))
                shapes += ((64, 64), (64,), (64, 64), (64,))
                y = layer([x, *(leaf(*shape) for shape in shapes)], split, backend)
                x = y.transpose(1, 2).unflatten(2, (side, side))
            split = {"kernel_size": 3, "stride": 2, "padding": 1}
            return soft_split_linear(x, leaf(384, 576), leaf(384), **split, backend=backend)

        saved = saved_bytes(lambda: module(x), apart=params) / batch / 2**20
    assert most / 4 <= saved <= most, f"{saved}; a quarter: the meter would see too little"
