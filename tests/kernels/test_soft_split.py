"""Soft split in every backend: parity, gradients, layouts, compilation, awkward sizes."""

import pytest
import torch

from t2t_kernels import soft_split
from t2t_kernels.library import operators
from tests.support.kernels.layouts import LAYOUTS, channels_last, contiguous
from tests.support.names import name
from tests.support.parity import assert_as_accurate

pytestmark = pytest.mark.usefixtures("poisoned")

# B, C, H, W and kernel_size, stride, padding: the model's splits on small maps, then awkward ones.
CASES = {
    "layer1": ((2, 3, 45, 37), (7, 4, 2)),
    "layer2": ((1, 64, 7, 6), (3, 2, 1)),
    "one-token": ((1, 5, 3, 3), (3, 2, 0)),
    "stride-over-kernel": ((2, 3, 17, 11), (2, 5, 0)),
    "padding-over-kernel": ((1, 2, 4, 5), (2, 1, 3)),
    "kernel-over-map": ((1, 9, 2, 1), (4, 1, 2)),
    "one-channel": ((3, 1, 16, 16), (5, 3, 2)),
    "empty-batch": ((0, 3, 16, 16), (7, 4, 2)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(backend, device, case, dtype, layout):
    shape, split = CASES[case]
    torch.manual_seed(len(case))
    x = layout(torch.randn(shape, device=device).to(dtype)).requires_grad_()

    ours = soft_split(x, *split, backend=backend)
    plain = soft_split(x, *split, backend="reference")
    assert ours.is_contiguous()
    assert torch.equal(ours, plain), "soft split moves data: it must be exact"

    grad = torch.randn_like(ours)
    (ours_grad,) = torch.autograd.grad(ours, x, grad)
    (plain_grad,) = torch.autograd.grad(plain, x, grad)
    wide = x.detach().double().requires_grad_()
    exact = soft_split(wide, *split, backend="reference")
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    assert_as_accurate(ours_grad, plain_grad, exact_grad, "gradient")


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name)
def test_gradient_has_the_layout_of_the_map(backend, device, layout):
    x = layout(torch.randn(2, 8, 9, 10, device=device)).requires_grad_()
    (grad,) = torch.autograd.grad(soft_split(x, 3, 2, 1, backend=backend).sum(), x)
    assert grad.stride() == x.stride()


def test_gradient_of_an_expanded_gradient(backend, device):
    """``sum().backward()`` passes a gradient whose strides are all zero."""
    x = torch.randn(2, 3, 9, 9, device=device, requires_grad=True)
    (ours,) = torch.autograd.grad(soft_split(x, 3, 2, 1, backend=backend).sum(), x)
    (plain,) = torch.autograd.grad(soft_split(x, 3, 2, 1, backend="reference").sum(), x)
    assert torch.equal(ours, plain)


def test_second_derivative(backend, device):
    x = torch.randn(1, 2, 6, 5, device=device, requires_grad=True)

    def loss(x):
        return soft_split(x, 3, 2, 1, backend=backend).pow(3).sum()

    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    # How many tokens cover each pixel.
    tokens = soft_split(x, 3, 2, 1, backend="reference")
    (count,) = torch.autograd.grad(tokens, x, torch.ones_like(tokens))
    torch.testing.assert_close(second, 6 * x.detach() * count)


@pytest.mark.filterwarnings("ignore:.*not a double precision.*")
def test_gradcheck(backend, device):
    """The kernels do not support float64. The function is linear, so large steps are exact in float32."""
    x = torch.randn(1, 2, 5, 4, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: soft_split(x, 3, 2, 1, backend=backend), x, eps=0.5, atol=1e-4, rtol=1e-4
    )


def test_gradcheck_reference():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    split = lambda x: soft_split(x, 3, 2, 1, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(split, x)
    assert torch.autograd.gradgradcheck(split, x)


def test_opcheck(backend, device):
    ops = operators(backend)
    for layout in (contiguous, channels_last):
        x = layout(torch.randn(2, 3, 9, 8, device=device)).requires_grad_()
        torch.library.opcheck(ops.soft_split, (x, 3, 2, 1))
    grad = torch.randn(2, 20, 27, device=device, requires_grad=True)
    for flag in (False, True):
        torch.library.opcheck(ops.soft_split_backward, (grad, 9, 8, 3, 2, 1, flag))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic):
    def step(x):
        return soft_split(x * 2, 3, 2, 1, backend=backend).square().sum(-1)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for size in (9, 12):
        x = channels_last(torch.randn(2, 3, size, 8, device=device)).requires_grad_()
        y, expected = compiled(x), step(x)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
        )


def test_export(backend, device):
    class Split(torch.nn.Module):
        def forward(self, x):
            return soft_split(x, 3, 2, 1, backend=backend)

    x = torch.randn(2, 3, 9, 8, device=device)
    exported = torch.export.export(Split(), (x,))
    assert torch.equal(exported.module()(x), soft_split(x, 3, 2, 1, backend=backend))


def test_autocast_does_not_change_the_dtype(backend, device):
    x = torch.randn(2, 3, 9, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert soft_split(x, 3, 2, 1, backend=backend).dtype == torch.float32


def test_deterministic_for_any_number_of_threads():
    x = torch.randn(3, 64, 20, 20).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(3, 100, 576)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = soft_split(x, 3, 2, 1, backend="cpu")
            results.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_more_than_32_bits_of_offsets(backend, device):
    if device.type != "cuda":
        pytest.skip("the GPU kernels are those with 32-bit programs")
    x = torch.randn(5000, 3, 224, 224, device=device, dtype=torch.float16)
    y = soft_split(x, 7, 4, 2, backend=backend)
    assert y.numel() > 2**31
    assert torch.equal(y[-2:], soft_split(x[-2:], 7, 4, 2, backend="reference"))
