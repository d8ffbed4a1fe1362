"""Each wrong argument gives one error with its name, what was given and what was expected."""

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
    """The errors are the same for every backend."""
    call, error, message = CASES[case]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


HALF = torch.bfloat16
HALF_X = torch.randn(1, 3, 8, 8, dtype=HALF)
TOKENS = torch.randn(1, 16, 64, dtype=HALF)
FEATURES = torch.randn(32, 64)
STATISTICS, SUMS = torch.randn(1, 16), torch.randn(1, 32, 64)
NUMBERS = (3, 2, 1)
PERFORMER_ARGUMENTS = {
    "x": HALF_X,
    **performer_params(27, 64, 32, 64, dtype=HALF)._asdict(),
    "seed": torch.zeros(1, dtype=torch.int64),
    "maximum": torch.randn(1, 32),
    "normalizer": torch.randn(1, 32),
    "sums": SUMS,
    "rest": (*NUMBERS, 1e-8, 0.1),
}
TRANSFORMER_ARGUMENTS = {
    "x": HALF_X,
    **transformer_params(27, 64, 64, dtype=HALF)._asdict(),
    "q": TOKENS,
    "k": TOKENS,
    "attended": TOKENS.float(),
    "maximum": STATISTICS,
    "normalizer": STATISTICS,
    "rest": (*NUMBERS, 0.2),
}
SAVED = {"q", "k", "attended", "maximum", "normalizer", "sums"}
LAYERS = {"performer_layer": PERFORMER_ARGUMENTS, "transformer_layer": TRANSFORMER_ARGUMENTS}


def operator_cases():
    """Operator, arguments, and the message with argument, got and expected."""
    weight, norm = torch.randn(8, 27, dtype=HALF), torch.randn(27, dtype=HALF)
    one, all_but = (HALF_X, weight, None, None, None), (*NUMBERS, 1e-5)
    yield "soft_split", (HALF_X[0], *NUMBERS), r"x: got shape \(3, 8, 8\), expected 4 dim"
    yield (
        "soft_split",
        (HALF_X.double(), *NUMBERS),
        "x: got float64, expected float32, bfloat16 or float16",
    )
    yield "soft_split", (HALF_X, 3, 0, 1), "got kernel_size 3, stride 0 and padding 1, expected"
    yield "soft_split", (HALF_X, 3, 2, -1), "got kernel_size 3, stride 2 and padding -1, expected"
    yield "soft_split", (HALF_X, 11, 2, 1), "x: got a map of 8x8, expected at least 9 in each"
    grad = torch.randn(1, 16, 27)
    yield "soft_split_backward", (grad[0], 8, 8, *NUMBERS, False), r"grad: got shape \(16, 27\)"
    yield (
        "soft_split_backward",
        (grad[:, :15], 8, 8, *NUMBERS, False),
        r"grad: got shape \(1, 15, 27\), expected \(1, 16, 27\)",
    )
    linear, backward = "soft_split_linear", "soft_split_linear_backward"
    yield linear, (HALF_X[0], *one[1:], *all_but), r"x: got shape \(3, 8, 8\), expected 4"
    yield (
        linear,
        (HALF_X, norm, *one[2:], *all_but),
        r"weight: got shape \(27,\), expected a matrix",
    )
    yield (
        linear,
        (HALF_X, weight[:, 1:], *one[2:], *all_but),
        r"weight: got shape \(8, 26\), expected \(8, 27\)",
    )
    yield (
        linear,
        (HALF_X, weight.float(), *one[2:], *all_but),
        "weight: got float32, expected bfloat16",
    )
    yield (
        linear,
        (HALF_X, weight, norm[:7], None, None, *all_but),
        r"bias: got shape \(7,\), expected \(8,\)",
    )
    yield linear, (HALF_X, weight, None, norm, None, *all_but), "norm_bias: got None, expected both"
    yield linear, (HALF_X, weight, None, None, norm, *all_but), "norm_weight: got None, expected"
    yield (
        backward,
        (grad.to(HALF)[..., :8], HALF_X, weight[:, :8], None, None, *all_but, True),
        r"weight: got shape \(8, 8\), expected \(8, 27\)",
    )
    yield (
        backward,
        (grad.to(HALF), HALF_X, weight, None, None, *all_but, True),
        r"grad: got shape \(1, 16, 27\), expected \(1, 16, 8\)",
    )
    q, wrong = TOKENS, TOKENS[:, 1:]
    shapes = r"got shape \(1, 15, 64\), expected \(1, 16, 64\)"
    token, performer = "token_attention", "performer_attention"
    yield token, (q, q, q[0], 0.2), r"v: got shape \(16, 64\), expected 3 dimensions"
    yield token, (q[:, :0], q[:, :0], q[:, :0], 0.2), r"v: got shape \(1, 0, 64\), expected \(B, T"
    yield token, (wrong, q, q, 0.2), f"q: {shapes}"
    yield token, (q, wrong, q, 0.2), f"k: {shapes}"
    yield token, (q, q.float(), q, 0.2), "k: got float32, expected bfloat16"
    saved = (q.float(), STATISTICS, STATISTICS)
    for i, name in enumerate(("grad", "q", "k", "v", "attended", "maximum", "normalizer")):
        if name != "v":
            arguments = [q, q, q, q, *saved]
            arguments[i] = arguments[i][:, 1:]
            yield f"{token}_backward", (*arguments, 0.2), f"{name}: got shape .*, expected"
    yield performer, (q, q, q[0], FEATURES, 1e-8), r"v: got shape \(16, 64\), expected 3 dimensions"
    yield performer, (wrong, q, q, FEATURES, 1e-8), f"k: {shapes}"
    yield performer, (q, wrong, q, FEATURES, 1e-8), f"q: {shapes}"
    yield performer, (q, q, q, FEATURES[:, 1:], 1e-8), r"w: got shape \(32, 63\), expected \("
    sums = (PERFORMER_ARGUMENTS["maximum"], PERFORMER_ARGUMENTS["normalizer"], SUMS)
    names = ("grad", "k", "q", "v", "w", "maximum", "normalizer", "sums")
    for i, name in enumerate(names):
        if name not in "vw":
            arguments = [q, q, q, q, FEATURES, *sums]
            arguments[i] = arguments[i][:, 1:]
            yield f"{performer}_backward", (*arguments, 1e-8), f"{name}: got shape .*, expected"
    for layer, arguments in LAYERS.items():
        for name, value in arguments.items():
            if name in ("x", "rest"):
                continue
            changed = value[:0] if value.dim() == 1 else value[:, 1:]
            message = f"{name}: got (shape|int64 of shape|.* rows) ?.*, expected"
            if "qkv" in name or "kqv" in name or name.startswith("norm1"):
                # The projection that the layers share has its own names for them.
                message = f"({name}|weight|bias|norm_weight|norm_bias): got .*, expected"
            given = arguments | {name: changed}
            rest = given.pop("rest")
            forward = [given[key] for key in given if key not in SAVED]
            if name not in SAVED:
                yield layer, (*forward, *rest), message
            yield f"{layer}_backward", (TOKENS, *given.values(), *rest, True), message
    given = {**PERFORMER_ARGUMENTS, "seed": None}
    rest = given.pop("rest")
    forward = [given[key] for key in given if key not in SAVED]
    yield "performer_layer", (*forward, *rest), "seed: got None, expected an int64 tensor"


OPERATOR_CASES = list(operator_cases())


@pytest.mark.parametrize("case", range(len(OPERATOR_CASES)))
def test_an_operator_names_what_is_wrong(case, backend, device):
    """Called like a loaded graph, without the checks of the public functions."""
    from t2t_kernels.library import operators

    if backend == "triton":
        pytest.skip("Python operators trust their schema's fake, which checks the same")
    name, arguments, message = OPERATOR_CASES[case]
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=f"^[a-z_]+: ({message})"):
        getattr(operators(backend), name)(*arguments)


def test_kernels_check_arguments_that_would_read_out_of_bounds(backend, device):
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
