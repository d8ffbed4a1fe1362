"""Each wrong argument gets one error that names it, what was given and what was expected."""

import pytest
import torch

from t2t_kernels import (
    output_size,
    performer_attention,
    performer_layer,
    soft_split,
    soft_split_linear,
    token_attention,
    transformer_layer,
    use_backend,
)
from tests.support.kernels.params import performer_params, transformer_params

X = torch.randn(1, 3, 8, 8)
WEIGHT = torch.randn(4, 27)
Q = torch.randn(1, 5, 6)
W = torch.randn(3, 6)
SPLIT = {"kernel_size": 3, "stride": 2, "padding": 1}
PERFORMER = performer_params(27, dtype=torch.float32)
TRANSFORMER = transformer_params(27, dtype=torch.float32)

CASES = {
    "rank": (lambda: soft_split(X[0], 3, 2, 1), ValueError, r"x: got shape \(3, 8, 8\)"),
    "not-a-tensor": (lambda: soft_split([1], 3, 2, 1), TypeError, "x: got list"),
    "integers": (lambda: soft_split(X.long(), 3, 2, 1), TypeError, "x: got torch.int64"),
    "complex": (lambda: soft_split(X.cfloat(), 3, 2, 1), TypeError, "x: got torch.complex64"),
    "sparse": (lambda: soft_split(X.to_sparse(), 3, 2, 1), TypeError, "layout torch.sparse_coo"),
    "too-small": (
        lambda: soft_split(X[..., :2], 3, 2, 0),
        ValueError,
        "a map of 8×2; .* at least 3",
    ),
    "no-channels": (lambda: soft_split(X[:, :0], 3, 2, 1), ValueError, "at least one channel"),
    "kernel-zero": (lambda: soft_split(X, 0, 2, 1), ValueError, "kernel_size: got 0"),
    "kernel-float": (lambda: soft_split(X, 3.0, 2, 1), TypeError, "kernel_size: got 3.0"),
    "kernel-pair": (lambda: soft_split(X, (3, 3), 2, 1), TypeError, "kernel_size: got"),
    "no-pixels": (lambda: soft_split(X[:, :, :0], 3, 2, 2), ValueError, "one pixel"),
    "kernel-huge": (lambda: soft_split(X, 2**33, 1, 2**32), ValueError, "kernel_size: got 8589"),
    "grid-stride": (lambda: output_size(8, 8, 3, 0, 1), ValueError, "stride: got 0"),
    "grid-padding": (lambda: output_size(8, 8, 3, 1, 0.5), TypeError, "padding: got 0.5"),
    "stride-zero": (lambda: soft_split(X, 3, 0, 1), ValueError, "stride: got 0"),
    "padding-negative": (lambda: soft_split(X, 3, 2, -1), ValueError, "padding: got -1"),
    "weight-width": (
        lambda: soft_split_linear(X, WEIGHT[:, :26], **SPLIT),
        ValueError,
        r"weight: got shape \(4, 26\), expected \(4, 27\)",
    ),
    "weight-rank": (
        lambda: soft_split_linear(X, WEIGHT[0], **SPLIT),
        ValueError,
        r"weight: got shape \(27,\)",
    ),
    "weight-dtype": (
        lambda: soft_split_linear(X, WEIGHT.half(), **SPLIT),
        TypeError,
        "weight: got torch.float16, expected torch.float32 as x has",
    ),
    "weight-device": (
        lambda: soft_split_linear(X, WEIGHT.to("meta"), **SPLIT),
        ValueError,
        "weight: got device meta, expected cpu",
    ),
    "bias-length": (
        lambda: soft_split_linear(X, WEIGHT, torch.zeros(3), **SPLIT),
        ValueError,
        r"bias: got shape \(3,\), expected \(4,\)",
    ),
    "half-a-norm": (
        lambda: soft_split_linear(X, WEIGHT, norm_weight=torch.ones(27), **SPLIT),
        ValueError,
        "norm_bias: got None, expected both",
    ),
    "eps": (lambda: soft_split_linear(X, WEIGHT, **SPLIT, eps=-1), ValueError, "eps: got -1"),
    "q-length": (
        lambda: performer_attention(Q, Q[:, :4], Q, W),
        ValueError,
        r"q: got shape \(1, 4, 6\), expected \(1, 5, 6\)",
    ),
    "v-rank": (lambda: performer_attention(Q, Q, Q[0], W), ValueError, r"v: got shape \(5, 6\)"),
    "w-width": (
        lambda: performer_attention(Q, Q, Q, W[:, :5]),
        ValueError,
        r"w: got shape \(3, 5\), expected \(m, 6\)",
    ),
    "performer-eps-nan": (
        lambda: performer_attention(Q, Q, Q, W, eps=float("nan")),
        ValueError,
        "eps: got nan",
    ),
    "no-tokens": (
        lambda: token_attention(Q[:, :0], Q[:, :0], Q[:, :0], scale=1.0),
        ValueError,
        "T and E at least 1",
    ),
    "scale": (lambda: token_attention(Q, Q, Q, scale="1"), TypeError, "scale: got '1'"),
    "scale-infinite": (
        lambda: token_attention(Q, Q, Q, scale=float("inf")),
        ValueError,
        "scale: got inf",
    ),
    "params-type": (
        lambda: performer_layer(X, TRANSFORMER, **SPLIT),
        TypeError,
        "params: got TransformerLayerParams, expected PerformerLayerParams",
    ),
    "params-shape": (
        lambda: performer_layer(X, PERFORMER._replace(norm2_bias=torch.zeros(5)), **SPLIT),
        ValueError,
        r"params.norm2_bias: got shape \(5,\), expected \(6,\)",
    ),
    "params-width": (
        lambda: transformer_layer(X[:, :2], TRANSFORMER, **SPLIT, scale=1.0),
        ValueError,
        r"params.norm1_weight: got shape \(27,\), expected \(18,\)",
    ),
    "dropout": (
        lambda: performer_layer(X, PERFORMER, **SPLIT, dropout_p=1.5),
        ValueError,
        "dropout_p: got 1.5",
    ),
    "seed": (
        lambda: performer_layer(X, PERFORMER, **SPLIT, dropout_p=0.5, seed=1.5),
        TypeError,
        "seed: got 1.5",
    ),
    "seed-tensor": (
        lambda: performer_layer(X, PERFORMER, **SPLIT, dropout_p=0.5, seed=torch.zeros(2)),
        TypeError,
        "seed: got a tensor of torch.float32",
    ),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, autocast):
    if autocast and case in ("weight-dtype", "seed-tensor"):
        pytest.skip("autocast converts what differs, and seeds not at all")
    call, error, message = CASES[case]
    if autocast:
        message = message.replace("torch.float32", "torch.bfloat16")
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with context, pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("case", ["rank", "integers", "too-small", "stride-zero"])
def test_bad_input_is_refused_before_any_kernel(case, backend):
    """The same errors whichever backend is asked for."""
    call, error, message = CASES[case]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


def test_kernels_check_what_would_read_out_of_bounds(backend, device):
    """The operators can be called without the public functions, for instance from a loaded graph."""
    from t2t_kernels.library import operators

    if backend == "triton":
        pytest.skip("Python operators trust their schema's fake, which checks the same")
    ops = operators(backend)
    with pytest.raises(RuntimeError, match="soft_split"):
        ops.soft_split(torch.randn(1, 3, 2, 2, device=device), 3, 1, 0)
    with pytest.raises(RuntimeError, match="soft_split"):
        ops.soft_split(torch.randn(1, 1, 1, 1, device=device), 2**33, 1, 2**32)
    grad = torch.randn(1, 9, 27, device=device)
    for kernel_size, stride in ((3, 2), (0, 1), (2**32, 1), (3, 0)):
        with pytest.raises(RuntimeError, match="soft_split"):
            ops.soft_split_backward(grad, 9, 9, kernel_size, stride, 1, False)
