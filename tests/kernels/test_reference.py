"""The references, compared with the published formulas, other sources, and float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from t2t_kernels import (
    PerformerLayerParams,
    TransformerLayerParams,
    performer_attention,
    performer_layer,
    soft_split,
    soft_split_linear,
    token_attention,
    transformer_layer,
)
from t2t_kernels.philox import dropout, keep_mask, philox_4x32
from tests.support.kernels.params import performer_params, random, transformer_params

SPLIT = {"kernel_size": 3, "stride": 2, "padding": 1}


def published_performer(k, q, v, w, eps):
    """The published formula, without shifts of the exponents."""

    def features(x):
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])

    phi_k, phi_q = features(k), features(q)
    normalizer = phi_q @ phi_k.sum(1).unsqueeze(2) + eps
    return phi_q @ (phi_k.transpose(1, 2) @ v) / normalizer


@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
def test_performer_equals_the_published_formula(eps):
    torch.manual_seed(0)
    k, q, v, w = random(2, 50, 16), random(2, 50, 16), random(2, 50, 16), random(8, 16)
    ours = performer_attention(k, q, v, w, eps=eps, backend="reference")
    torch.testing.assert_close(ours, published_performer(k, q, v, w, eps), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("rms", [0.1, 1.0, 2.0, 8.0])
def test_performer_in_float32_is_accurate_if_the_published_one_is_nan(rms, eps):
    torch.manual_seed(1)
    shape, w = (1, 785, 64), torch.nn.init.orthogonal_(torch.empty(32, 64)) * math.sqrt(32)
    k, q, v = (torch.randn(shape) * rms for _ in range(3))
    ours = performer_attention(k, q, v, w, eps=eps, backend="reference")
    exact = performer_attention(
        k.double(), q.double(), v.double(), w.double(), eps=eps, backend="reference"
    )
    error = (ours - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error < 3e-5, f"relative error {error:.1e} at rms {rms}"
    if rms == 8.0 and eps == 0.0:
        assert published_performer(k, q, v, w, eps).isnan().any()


@pytest.mark.parametrize("eps", [0.0, 1e-50, 1e-8, 1e38])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 100.0),
        (torch.float32, 1e18),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 6e4),
        (torch.float64, 1e150),
    ],
)
def test_performer_is_finite_for_every_finite_input(dtype, size, eps):
    torch.manual_seed(2)
    k, q = (((torch.rand(2, 9, 8) - 0.5) * 2).double().mul(size).to(dtype) for _ in range(2))
    k[0, 0], q[0, 1] = size, -size
    v, w = torch.randn(2, 9, 8).to(dtype), torch.randn(4, 8)
    leaves = [tensor.requires_grad_() for tensor in (k, q, v)]
    y = performer_attention(*leaves, w, eps=eps, backend="reference")
    assert y.isfinite().all()
    for name, grad in zip("kqv", torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.isfinite().all(), f"gradient of {name}"


@pytest.mark.parametrize(("rms", "eps"), [(0.7, 1e-8), (1.0, 1e-8), (1.6, 1e-8), (1.5, 0.1)])
def test_performer_gradients_if_eps_dominates(rms, eps):
    torch.manual_seed(8)
    w = torch.nn.init.orthogonal_(torch.empty(32, 64)) * math.sqrt(32)
    k, q, v, dy = (torch.randn(1, 300, 64) * scale for scale in (rms, rms, 1, 1))

    def gradients(dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (k, q, v)]
        y = performer_attention(*leaves, w.to(dtype), eps=eps, backend="reference")
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    for name, ours, exact in zip("kqv", gradients(torch.float32), gradients(torch.float64)):
        error = (ours - exact).norm() / exact.norm()
        assert error < 3e-5, f"gradient of {name}: relative error {error:.1e}"


def test_token_attention_in_float16_with_large_scores():
    torch.manual_seed(9)
    q, k, v = (torch.randn(1, 30, 64).half() for _ in range(3))
    y = token_attention(q * 100, k * 50, v, scale=0.125, backend="reference")
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_performer_in_half_precision_has_only_rounding_errors(dtype):
    torch.manual_seed(3)
    k, q, v = (torch.randn(1, 200, 64).to(dtype) for _ in range(3))
    w = torch.randn(32, 64)
    ours = performer_attention(k, q, v, w, backend="reference")
    wide = performer_attention(k.double(), q.double(), v.double(), w.double(), backend="reference")
    torch.testing.assert_close(ours.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_performer_maximum_is_over_tokens_not_within_them():
    """Subtracting a maximum per token of k would change the function."""
    k = torch.zeros(1, 2, 2, dtype=torch.float64)
    k[0, 0] = 3.0
    v = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    w = torch.ones(1, 2, dtype=torch.float64)
    y = performer_attention(k, k, v, w, eps=0.0, backend="reference")
    # log φ(k_0) = 6 − 9, log φ(k_1) = 0.
    torch.testing.assert_close(y[0, 0, 0].item(), 1 / (1 + math.exp(-3)))


def test_token_attention_equals_sdpa():
    torch.manual_seed(4)
    q, k, v = (random(2, 30, 8) for _ in range(3))
    ours = token_attention(q, k, v, scale=147**-0.5, backend="reference")
    torch.testing.assert_close(
        ours, F.scaled_dot_product_attention(q, k, v, scale=147**-0.5), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
def test_flat_patches(value):
    x = torch.full((1, 3, 16, 16), value, dtype=torch.float64)
    weight, norm_weight, norm_bias = random(4, 27), random(27), random(27)
    y = soft_split_linear(x, weight, None, norm_weight, norm_bias, **SPLIT, backend="reference")
    inner = y.view(1, 8, 8, 4)[0, 1:, 1:]
    expected = (weight @ norm_bias).expand_as(inner)
    torch.testing.assert_close(inner, expected, rtol=1e-9, atol=1e-9)


def test_soft_split_linear_without_norm_is_a_convolution():
    x, weight, bias = random(2, 3, 11, 9), random(5, 27), random(5)
    y = soft_split_linear(x, weight, bias, **SPLIT, backend="reference")
    convolution = F.conv2d(x, weight.view(5, 3, 3, 3), bias, stride=2, padding=1)
    torch.testing.assert_close(y, convolution.flatten(2).transpose(1, 2))


def test_gradcheck_of_every_reference():
    torch.manual_seed(5)
    x = random(1, 1, 5, 4).requires_grad_()
    k, q, v, w = random(1, 5, 3), random(1, 5, 3), random(1, 5, 3), random(2, 3)
    leaves = [tensor.requires_grad_() for tensor in (k, q, v)]
    reference = {"backend": "reference"}
    assert torch.autograd.gradcheck(
        lambda k, q, v: performer_attention(k, q, v, w, **reference), leaves
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: token_attention(q, k, v, scale=0.5, **reference), leaves
    )
    performer = performer_params(9, embed=3, features=2, hidden=2)
    performer = PerformerLayerParams(*(tensor.requires_grad_() for tensor in performer))
    assert torch.autograd.gradcheck(
        lambda x, *p: performer_layer(
            x, PerformerLayerParams(performer.w, *p), **SPLIT, dropout_p=0.3, seed=7, **reference
        ),
        (x, *performer[1:]),
    )
    transformer = TransformerLayerParams(
        *(t.requires_grad_() for t in transformer_params(9, embed=3, hidden=2))
    )
    assert torch.autograd.gradcheck(
        lambda x, *p: transformer_layer(
            x, TransformerLayerParams(*p), **SPLIT, scale=0.3, **reference
        ),
        (x, *transformer),
    )


def test_random_features_receive_no_gradient():
    x, params = random(1, 2, 5, 4), performer_params(18)
    params.w.requires_grad_()
    params.proj_bias.requires_grad_()
    y = performer_layer(x, params, **SPLIT, backend="reference")
    y.sum().backward()
    assert params.w.grad is None
    assert params.proj_bias.grad is not None


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The known-answer vectors that the authors of Philox publish."""
    words = philox_4x32(
        tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key)
    )
    assert tuple(word.item() for word in words) == expected


def test_dropout_mask():
    shape = torch.Size((4, 1000, 25))
    mask = keep_mask(shape, 0.1, 3, 0, "cpu")
    # Five standard deviations of a binomial.
    assert abs(mask.double().mean().item() - 0.9) < 5 * math.sqrt(0.1 * 0.9 / shape.numel())
    assert torch.equal(mask, keep_mask(shape, 0.1, torch.tensor(3), 0, "cpu"))
    assert not torch.equal(mask, keep_mask(shape, 0.1, 4, 0, "cpu")), "seeds must differ"
    assert not torch.equal(mask, keep_mask(shape, 0.1, 3, 1, "cpu")), "sites must differ"
    assert not torch.equal(mask, keep_mask(shape, 0.1, 3 + 2**40, 0, "cpu")), "all 64 bits count"
    assert torch.equal(
        keep_mask(shape, 0.1, 2**64 - 1, 0, "cpu"), keep_mask(shape, 0.1, -1, 0, "cpu")
    )
    # The mask is a function of the element's index: a longer tensor begins with the same one.
    longer = keep_mask(torch.Size((shape.numel() + 3,)), 0.1, 3, 0, "cpu")
    assert torch.equal(longer[:-3], mask.flatten())


def test_dropout_mask_takes_sixteen_bits_of_a_block():
    """The first element's number is the lower half of the first word, the second one's the upper."""
    first, second = (
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        philox_4x32(
            tuple(torch.tensor(word) for word in (1, 0, 0, 0)), (torch.tensor(0), torch.tensor(0))
        ),
    )
    numbers = [half for word in (*first, *map(int, second)) for half in (word & 0xFFFF, word >> 16)]
    for threshold in numbers:
        mask = keep_mask(torch.Size((16,)), threshold / 2**16, 0, 0, "cpu")
        assert mask.tolist() == [number >= threshold for number in numbers]


@pytest.mark.parametrize("p", [1e-7, 0.1, 0.3, 1 - 1e-7])
def test_dropout_keeps_the_expectation(p):
    """The scale is that of the rounded probability, not of p."""
    kept = dropout(torch.ones(16, 2**16), p, 5, 0)
    rounded = round(p * 2**16) / 2**16
    scale = 1 / (1 - rounded) if rounded < 1 else 0.0
    assert all(value == pytest.approx(scale) for value in kept[kept > 0].unique().tolist())
    # Five standard deviations.
    deviation = math.sqrt(rounded / max(1 - rounded, 1e-9) / kept.numel())
    assert abs(kept.mean().item() - (rounded < 1)) <= 5 * deviation + 1e-6


@pytest.mark.parametrize("seed", [None, 5])
def test_dropout_at_its_limits(seed):
    x = torch.randn(7, 11)
    assert dropout(x, 0.0, seed, 0) is x
    assert torch.equal(dropout(x, 1.0, seed, 0), torch.zeros_like(x))
    kept = dropout(torch.ones(1000), 0.5, seed, 0)
    assert set(kept.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_run_and_are_differentiable_in_every_dtype(dtype):
    torch.manual_seed(6)
    x = torch.randn(2, 3, 11, 8).to(dtype).requires_grad_()
    for layer, params, extra in (
        (performer_layer, performer_params(27, dtype=dtype), {"dropout_p": 0.1}),
        (transformer_layer, transformer_params(27, dtype=dtype), {"scale": 27**-0.5}),
    ):
        y = layer(x, params, **SPLIT, **extra)
        assert y.dtype == dtype
        assert y.shape == (2, 24, 6)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        assert grad.isfinite().all()


def test_float16_inputs_that_make_the_published_performer_nan():
    """Under autocast the published formula gives NaN at unit rms: features exceed float16."""
    torch.manual_seed(7)
    k, q, v = (torch.randn(1, 785, 64, dtype=torch.float16) for _ in range(3))
    w = (torch.nn.init.orthogonal_(torch.empty(32, 64)) * math.sqrt(32)).half()
    assert published_performer(k, q, v, w, 1e-8).isnan().any()
    assert performer_attention(k, q, v, w).isfinite().all()


def test_autocast():
    x = torch.randn(2, 3, 11, 8, requires_grad=True)
    params = performer_params(27, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = performer_layer(x, params, **SPLIT)
        assert y.dtype == torch.bfloat16
        projected = soft_split_linear(x, params.kqv_weight, params.kqv_bias, **SPLIT)
        assert projected.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), performer_layer(x, params, **SPLIT), rtol=0.1, atol=0.1)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32


def test_layers_compile_without_a_graph_break():
    x = torch.randn(2, 3, 11, 8)
    performer, transformer = (
        performer_params(27, dtype=torch.float32),
        transformer_params(27, dtype=torch.float32),
    )

    def both(x, seed):
        y = performer_layer(x, performer, **SPLIT, dropout_p=0.2, seed=seed)
        return y + transformer_layer(x, transformer, **SPLIT, scale=0.2)

    seed = torch.tensor(11)
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(x, seed), both(x, seed))


def test_empty_batch_and_one_token():
    params = performer_params(27, dtype=torch.float32)
    assert performer_layer(torch.randn(0, 3, 11, 8), params, **SPLIT).shape == (0, 24, 6)
    y = performer_layer(torch.randn(1, 3, 1, 1), params, **SPLIT, eps=0.0)
    assert y.shape == (1, 1, 6)
    assert y.isfinite().all()


def test_soft_split_order_of_elements():
    """Channel-major: (channel, row, column), tokens row by row."""
    x = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)
    tokens = soft_split(x, 2, 1, 0, backend="reference")
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 1].tolist() == [1, 2, 5, 6, 13, 14, 17, 18]
    assert tokens[0, 3].tolist() == [4, 5, 8, 9, 16, 17, 20, 21]


def test_shapes_on_the_meta_device():
    """Tools that count operations or infer shapes run models on the meta device."""
    params = performer_params(27, dtype=torch.float32)
    params = PerformerLayerParams(*(tensor.to("meta") for tensor in params))
    y = performer_layer(torch.empty(2, 3, 11, 8, device="meta"), params, **SPLIT)
    assert y.shape == (2, 24, 6)
