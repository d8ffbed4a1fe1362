"""Soft split, norm and linear in every backend that fuses them: parity, gradients, contracts."""

import pytest
import torch

from t2t_kernels import BackendUnavailable, soft_split_linear
from t2t_kernels.backends import OPERATIONS
from t2t_kernels.library import operators
from tests.support.kernels.layouts import LAYOUTS, channels_last
from tests.support.kernels.soft_split_linear import CASES, arguments, assert_parity, gradients
from tests.support.names import name
from tests.support.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned", "fused")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Channels and dtype of a property: half types have kernels of their own for the image and for maps
# of 64 channels.
KINDS = {
    "image-float32": (3, torch.float32),
    "image-bfloat16": (3, torch.bfloat16),
    "image-float16": (3, torch.float16),
    "map-bfloat16": (64, torch.bfloat16),
    "map-float16": (64, torch.float16),
}


@pytest.fixture(params=KINDS)
def kind(request, skip_unless_taken):
    channels, dtype = KINDS[request.param]
    skip_unless_taken("soft_split_linear", dtype)
    return channels, dtype


@pytest.fixture
def fused(backend):
    if backend not in OPERATIONS["soft_split_linear"].kernels:
        pytest.skip(f"no {backend} kernel yet")


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, dtype) for case in ("layer1", "layer2", "empty-batch") for dtype in DTYPES[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_parity(backend, device, case, dtype, norm, skip_unless_taken):
    shape, split, outputs = CASES[case]
    skip_unless_taken("soft_split_linear", dtype)
    assert_parity(arguments(shape, split, outputs, norm, True, dtype, device), split, backend)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(18, torch.float32), *KINDS.values()],
    ids=lambda value: str(value) if isinstance(value, int) else name(value),
)
def test_layouts(backend, device, channels, dtype, layout, skip_unless_taken):
    split = (3, 2, 1)
    skip_unless_taken("soft_split_linear", dtype)
    tensors = arguments((2, channels, 7, 6), split, 16, True, False, dtype, device)
    ours = assert_parity(tensors, split, backend, layout)
    expected = channels_last(tensors[0]) if layout is channels_last else tensors[0]
    assert ours["x"].stride() == expected.stride(), "the gradient has the layout of the map"


@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
def test_flat_patches(backend, device, kind, value):
    """The variance is zero, so a rounding error of the mean would be amplified by 316."""
    split, (channels, dtype) = (3, 2, 1), kind
    tensors = arguments((1, channels, 8, 9), split, 16, True, True, dtype, device)
    tensors[0].fill_(value)
    assert_parity(tensors, split, backend)


def test_without_the_gradient_of_the_map(backend, device, kind):
    channels, dtype = kind
    tensors = arguments((1, channels, 8, 9), (3, 2, 1), 16, True, True, dtype, device)

    def gradient(backend, dtype):
        x, weight, *rest = (tensor.to(dtype) for tensor in tensors)
        weight.requires_grad_()
        split = {"kernel_size": 3, "stride": 2, "padding": 1}
        y = soft_split_linear(x, weight, *rest, **split, backend=backend)
        return torch.autograd.grad(y.sum(), weight)[0]

    exact = gradient("reference", torch.float64)
    assert_as_accurate(gradient(backend, dtype), gradient("reference", dtype), exact)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_nan_only_reaches_patches_that_contain_it(backend, device, kind, norm):
    """A NaN only reaches patches that contain it."""
    channels, dtype = kind
    # The column behind a patch of three is not that of the next patch.
    for split in ((3, 4, 0), (3, 2, 0), (7, 4, 2)):
        kernel_size, stride, padding = split
        if channels > 3 and kernel_size == 7:
            continue
        tensors = arguments((2, channels, 12, 12), split, 16, norm, True, dtype, device)
        tensors[0][1, channels // 2, 5, 7] = torch.nan
        geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        ours = soft_split_linear(*tensors, **geometry, backend=backend)
        # In float64: in torch's half-precision products, a NaN can reach the previous row.
        exact = [None if tensor is None else tensor.double() for tensor in tensors]
        exact = soft_split_linear(*exact, **geometry, backend="reference")
        assert torch.equal(ours.isnan(), exact.isnan()), split


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(18, torch.float32), *KINDS.values()],
    ids=lambda value: str(value) if isinstance(value, int) else name(value),
)
def test_deterministic(backend, device, channels, dtype, skip_unless_taken):
    skip_unless_taken("soft_split_linear", dtype)
    tensors = arguments((3, channels, 9, 9), (3, 2, 1), 24, True, True, dtype, device)
    first, second = (gradients(tensors, (3, 2, 1), backend, dtype) for _ in range(2))
    assert all(torch.equal(first[what], second[what]) for what in first)


def test_opcheck(backend, device, kind):
    channels, dtype = kind
    ops = operators(backend)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for norm in (True, False):
        tensors = arguments((1, channels, 5, 4), (3, 2, 1), 8, norm, True, dtype, device)
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
        torch.library.opcheck(ops.soft_split_linear, (*tensors, 3, 2, 1, 1e-5), test_utils=tests)


def test_compile(backend, device, kind):
    channels, dtype = kind
    tensors = arguments((1, channels, 5, 4), (3, 2, 1), 8, True, True, dtype, device)

    def step(x):
        split = {"kernel_size": 3, "stride": 2, "padding": 1}
        return soft_split_linear(x * 2, *tensors[1:], **split, backend=backend).square()

    x = tensors[0].requires_grad_()
    y, expected = torch.compile(step, fullgraph=True)(x), step(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    )


def test_second_derivative_is_refused(backend, device):
    tensors = arguments((1, 3, 5, 4), (3, 2, 1), 8, True, True, torch.bfloat16, device)
    x = tensors[0].requires_grad_()
    y = soft_split_linear(x, *tensors[1:], kernel_size=3, stride=2, padding=1, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


# What the CUDA kernels do not take: channels, dtype, kernel_size, stride, outputs, and what the error says.
REFUSED = {
    "float32": (64, torch.float32, 3, 2, 8, "takes float16 and bfloat16, got float32"),
    "channels": (20, torch.bfloat16, 3, 2, 8, "got 20 channels and kernel_size 3"),
    "rows": (5, torch.float16, 7, 4, 8, "channels × kernel_size up to 28, got 5 channels"),
    "columns": (
        1,
        torch.bfloat16,
        9,
        4,
        8,
        "kernel_size up to 8 .* got 1 channels and kernel_size 9",
    ),
    "stride": (64, torch.bfloat16, 3, 9, 8, "takes strides up to 8, got 9"),
    "outputs": (64, torch.bfloat16, 3, 2, 12, "takes a multiple of 8 outputs, got 12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_sizes_on_cuda_are_refused_with_the_reason(backend, device, case):
    if backend != "cuda":
        pytest.skip("the listed limits are those of the cuda backend")
    channels, dtype, kernel_size, stride, outputs, reason = REFUSED[case]
    split = (kernel_size, stride, 0)
    x, *rest = arguments((1, channels, 10, 10), split, outputs, True, True, dtype, device)
    with pytest.raises(BackendUnavailable, match=f"on the cuda backend: its kernel .*{reason}"):
        soft_split_linear(
            x, *rest, kernel_size=kernel_size, stride=stride, padding=0, backend="cuda"
        )
    # Without this check the operator would read beyond its tensors.
    with pytest.raises(RuntimeError, match="soft_split_linear: .*got .*, expected"):
        operators("cuda").soft_split_linear(x, *rest, *split, 1e-5)
