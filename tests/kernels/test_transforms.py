"""The operations under function transforms and PyTorch's operation counter."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import t2t_kernels
from t2t_kernels import BackendUnavailable
from tests.support.kernels.params import performer_params, transformer_params

SPLIT = {"kernel_size": 3, "stride": 2, "padding": 1}


def tensors(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float32) for shape in shapes]


def soft_split(x, backend=None):
    return t2t_kernels.soft_split(x, **SPLIT, backend=backend)


def soft_split_linear(x, weight, norm_weight, norm_bias, backend=None):
    parameters = (weight, None, norm_weight, norm_bias)
    return t2t_kernels.soft_split_linear(x, *parameters, **SPLIT, backend=backend)


def performer_attention(k, q, v, w, backend=None):
    return t2t_kernels.performer_attention(k, q, v, w.detach(), backend=backend)


def token_attention(q, k, v, backend=None):
    return t2t_kernels.token_attention(q, k, v, scale=0.5, backend=backend)


def performer_layer(x, w, *rest, backend=None):
    params = t2t_kernels.PerformerLayerParams(w.detach(), *rest)
    return t2t_kernels.performer_layer(x, params, **SPLIT, backend=backend)


def transformer_layer(x, *rest, backend=None):
    params = t2t_kernels.TransformerLayerParams(*rest)
    return t2t_kernels.transformer_layer(x, params, **SPLIT, scale=0.3, backend=backend)


MAP, ROWS = (2, 2, 6, 8), (2, 12, 6)
CASES = {
    soft_split: lambda: tensors(MAP),
    soft_split_linear: lambda: tensors(MAP, (5, 18), 18, 18),
    performer_attention: lambda: tensors(ROWS, ROWS, ROWS, (4, 6)),
    token_attention: lambda: tensors(ROWS, ROWS, ROWS),
    performer_layer: lambda: [*tensors(MAP), *performer_params(18, dtype=torch.float32)],
    transformer_layer: lambda: [*tensors(MAP), *transformer_params(18, dtype=torch.float32)],
}
over_operations = pytest.mark.parametrize("operation", CASES, ids=lambda f: f.__name__)


def tangents(arguments):
    torch.manual_seed(1)
    return [torch.randn_like(argument) for argument in arguments]


@over_operations
def test_forward_mode_uses_the_reference(operation):
    arguments = CASES[operation]()
    args, directions = tuple(arguments), tuple(tangents(arguments))
    _, got = jvp(operation, args, directions)
    _, expected = jvp(lambda *a: operation(*a, backend="reference"), args, directions)
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected)


@over_operations
def test_dual_tensor_in_any_place(operation):
    """A tangent on one argument at a time."""
    arguments = CASES[operation]()
    for place, direction in enumerate(tangents(arguments)):
        with forward_ad.dual_level():
            dual = list(arguments)
            dual[place] = forward_ad.make_dual(dual[place], direction)
            got = forward_ad.unpack_dual(operation(*dual)).tangent
            expected = forward_ad.unpack_dual(operation(*dual, backend="reference")).tangent
        assert (got is None) == (expected is None), f"argument {place}"
        if expected is not None:
            torch.testing.assert_close(got, expected)


@over_operations
def test_named_backend_refuses(operation):
    x, *rest = CASES[operation]()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(BackendUnavailable, match='forward-mode AD; use backend="reference"'):
            operation(dual, *rest, backend="cpu")
    with pytest.raises(BackendUnavailable, match="torch.func; use backend"):
        grad(lambda x: operation(x, *rest, backend="cpu").sum())(x)


@over_operations
def test_per_sample_gradients(operation):
    arguments = CASES[operation]()
    if operation in (performer_attention, token_attention):
        in_dims = tuple(0 if a.dim() == 3 else None for a in arguments)
    else:
        in_dims = (0, *[None] * (len(arguments) - 1))

    def loss(*one):
        batched = [a[None] if dim == 0 else a for a, dim in zip(one, in_dims, strict=True)]
        return operation(*batched).square().sum()

    got = vmap(grad(loss), in_dims=in_dims)(*arguments)
    for i in range(2):
        one = [a[i] if dim == 0 else a for a, dim in zip(arguments, in_dims, strict=True)]
        leaf = one[0].clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf, *one[1:]), leaf)[0]
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-4)


@over_operations
def test_second_derivatives(operation):
    arguments = [argument.double() for argument in CASES[operation]()]

    def loss(factor, backend=None):
        return operation(arguments[0] * factor, *arguments[1:], backend=backend).square().mean()

    one = torch.ones((), dtype=torch.float64)
    expected = hessian(lambda f: loss(f, "reference"))(one)
    torch.testing.assert_close(hessian(loss)(one), expected)
    arguments = [argument.float() for argument in arguments]
    got = hessian(loss)(one.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        jacfwd(loss)(one.float()), grad(loss)(one.float()), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    "operation", [f for f in CASES if f is not soft_split], ids=lambda f: f.__name__
)
def test_double_backward_names_the_remedy(operation):
    x, *rest = CASES[operation]()
    x.requires_grad_()
    (first,) = torch.autograd.grad(operation(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='use backend="reference"'):
        first.square().sum().backward()


def test_compiled_tangent():
    """Also under torch.compile."""
    x, direction = tensors(MAP, MAP)
    compiled = torch.compile(lambda x, t: jvp(soft_split, (x,), (t,))[1], backend="eager")
    torch.testing.assert_close(compiled(x, direction), soft_split(direction))


def counted(operation, arguments, need_x, backend):
    arguments = [argument.clone().requires_grad_() for argument in arguments]
    arguments[0].requires_grad_(need_x)
    with FlopCounterMode(display=False) as forward:
        y = operation(*arguments, backend=backend)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@over_operations
def test_counts_the_products_of_the_reference(operation):
    arguments = CASES[operation]()
    if operation is soft_split:
        assert counted(operation, arguments, True, "cpu") == (0, 0)
        return
    assert counted(operation, arguments, True, "cpu") == counted(
        operation, arguments, True, "reference"
    )


@pytest.mark.parametrize(
    "operation", [soft_split_linear, performer_layer, transformer_layer], ids=lambda f: f.__name__
)
def test_counts_no_gradient_of_an_image(operation):
    """The norm's gradients follow from that of W, so one product less is needed than in plain PyTorch."""
    arguments = CASES[operation]()
    forward, backward = counted(operation, arguments, False, "cpu")
    weight = next(a for a in arguments[1:] if a.dim() == 2 and a.shape[1] == 18)
    saved = 2 * 2 * 12 * weight.numel()
    assert (forward, backward + saved) == counted(operation, arguments, False, "reference")
