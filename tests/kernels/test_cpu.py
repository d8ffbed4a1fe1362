"""Tests of the CPU kernels only: instruction sets, threads, chunks of tokens."""

import os
import subprocess
import sys

import pytest
import torch

import t2t_kernels
from t2t_kernels.backends import why_unavailable
from tests.support.kernels import (
    performer_layer,
    soft_split_linear,
    token_attention,
    transformer_layer,
)
from tests.support.kernels.layouts import LAYOUTS
from tests.support.kernels.params import performer_params, transformer_params

pytestmark = pytest.mark.skipif(
    why_unavailable("cpu") is not None, reason=str(why_unavailable("cpu"))
)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(*arguments: str, isa: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "T2T_CPU_ISA": isa},
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_parity_in_every_instruction_set(isa):
    done = run("-c", "from t2t_kernels import _C; print(_C.cpu_isa())", isa=isa)
    if done.returncode != 0 and "expected one that this CPU runs" in done.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert done.stdout.strip() == isa, done.stderr
    done = run("-m", "tests.support.kernels.cpu_parity", isa=isa)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_if_each_query_attends_to_one_key(dtype):
    """The weights of other keys are below e^−87, and become exactly zero."""
    torch.manual_seed(5)
    k, v = torch.randn(2, 2, 40, 64)
    k = 30 * k / k.norm(dim=-1, keepdim=True)
    k, v = k.to(dtype), v.to(dtype)
    ours = token_attention.gradients([k, k, v], 1.0, "cpu", dtype)
    assert torch.equal(ours["y"], v)
    assert ours["q"].count_nonzero() == ours["k"].count_nonzero() == 0


def test_unknown_instruction_set():
    done = run("-c", "from t2t_kernels import _C; _C.cpu_isa()", isa="sse9")
    assert done.returncode != 0
    assert "T2T_CPU_ISA: got 'sse9', expected one that this CPU runs: " in done.stderr


def assert_same_for_any_number_of_threads(function) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Enough tokens for several chunks an image, several images a group and several slots.
MAP, SPLIT = (5, 18, 70, 66), (3, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_soft_split_linear_is_deterministic(dtype):
    tensors = soft_split_linear.arguments(MAP, SPLIT, 20, True, True, dtype, "cpu")
    assert_same_for_any_number_of_threads(
        lambda: list(soft_split_linear.gradients(tensors, SPLIT, "cpu", dtype).values())
    )


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_performer_layer_is_deterministic(dtype, monkeypatch):
    monkeypatch.setitem(performer_layer.CASES, "chunks", (MAP, SPLIT, (16, 8, 16)))
    tensors, split = performer_layer.arguments("chunks", dtype, "cpu")
    assert_same_for_any_number_of_threads(
        lambda: list(
            performer_layer.gradients(tensors, split, "cpu", dtype, dropout_p=0.1, seed=1).values()
        )
    )


def test_performer_attention_is_deterministic():
    k, q, v = (torch.randn(3, 700, 24).requires_grad_() for _ in range(3))
    w = torch.randn(10, 24)

    def call():
        y = t2t_kernels.performer_attention(k, q, v, w, backend="cpu")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (k, q, v))]

    assert_same_for_any_number_of_threads(call)


def test_token_attention_is_deterministic():
    q, k, v = (torch.randn(3, 1100, 24).requires_grad_() for _ in range(3))

    def call():
        y = t2t_kernels.token_attention(q, k, v, scale=0.2, backend="cpu")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))]

    assert_same_for_any_number_of_threads(call)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_transformer_layer_is_deterministic(dtype, monkeypatch):
    monkeypatch.setitem(transformer_layer.CASES, "chunks", (MAP, SPLIT, (16, 16)))
    tensors, split = transformer_layer.arguments("chunks", dtype, "cpu")
    assert_same_for_any_number_of_threads(
        lambda: list(transformer_layer.gradients(tensors, split, "cpu", dtype).values())
    )


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_parity_over_chunks(layout, monkeypatch):
    """Tokens of several chunks: bands of the map's gradient overlap, sums are merged."""
    tensors = soft_split_linear.arguments(MAP, (5, 2, 2), 20, True, True, torch.float32, "cpu")
    soft_split_linear.assert_parity(tensors, (5, 2, 2), "cpu", layout)
    monkeypatch.setitem(performer_layer.CASES, "chunks", (MAP, SPLIT, (16, 8, 16)))
    tensors, split = performer_layer.arguments("chunks", torch.float32, "cpu")
    performer_layer.assert_parity(tensors, split, "cpu", layout, dropout_p=0.1, seed=1)
    monkeypatch.setitem(transformer_layer.CASES, "chunks", (MAP, SPLIT, (16, 16)))
    tensors, split = transformer_layer.arguments("chunks", torch.float32, "cpu")
    transformer_layer.assert_parity(tensors, split, "cpu", layout)


def test_patches_with_an_offset():
    """Small contrasts on a large brightness, for which Σx² − (Σx)² would lose all precision."""
    torch.manual_seed(0)
    tensors = soft_split_linear.arguments(
        (1, 3, 20, 20), SPLIT, 9, True, True, torch.float32, "cpu"
    )
    tensors[0] = 1000 + 0.01 * tensors[0]
    soft_split_linear.assert_parity(tensors, SPLIT, "cpu")


def test_operators_check_arguments_that_would_read_out_of_bounds():
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 27)
    ops = torch.ops.t2t_cpu
    for arguments in (
        (x, weight[:, :26], None, None, None, 3, 2, 1, 1e-5),
        (x, weight, torch.zeros(3), None, None, 3, 2, 1, 1e-5),
        (x, weight, None, torch.zeros(27), None, 3, 2, 1, 1e-5),
        (x, weight, None, torch.zeros(26), torch.zeros(27), 3, 2, 1, 1e-5),
        (x, weight.bfloat16(), None, None, None, 3, 2, 1, 1e-5),
        (x[..., :2, :2], weight, None, None, None, 3, 2, 0, 1e-5),
    ):
        with pytest.raises(RuntimeError, match="soft_split_linear"):
            ops.soft_split_linear(*arguments)
    with pytest.raises(
        RuntimeError, match="soft_split: got kernel_size 3, stride 1 and padding 2147483645"
    ):
        ops.soft_split(x, 3, 1, 2**31 - 3)
    with pytest.raises(RuntimeError, match="soft_split_linear: got kernel_size 4294967296"):
        ops.soft_split_linear(x, weight[:, :0], None, None, None, 2**32, 1, 2**31, 1e-5)
    with pytest.raises(RuntimeError, match="soft_split_linear: grad"):
        ops.soft_split_linear_backward(
            torch.randn(1, 15, 4), x, weight, None, None, 3, 2, 1, 1e-5, True
        )
    k = torch.randn(1, 5, 6)
    with pytest.raises(RuntimeError, match="performer_attention: q"):
        ops.performer_attention(k, k[:, :4], k, torch.randn(3, 6), 1e-8)
    with pytest.raises(RuntimeError, match="token_attention: q"):
        ops.token_attention(k[:, :4], k, k, 1.0)
    y = t2t_kernels.soft_split_linear(x, weight, kernel_size=3, stride=2, padding=1, backend="cpu")
    assert y.shape == (1, 16, 4)


def operator_calls():
    """Every fused operator, forward and backward, with arguments that it takes."""
    ops, split = torch.ops.t2t_cpu, (3, 2, 1)
    x, w, seed = torch.randn(2, 3, 7, 8), torch.randn(3, 6), torch.tensor([3])
    k, q, v = torch.randn(3, 2, 16, 6)
    performer = performer_params(27, 6, 3, 7, dtype=torch.float32)
    transformer = transformer_params(27, 6, 7, dtype=torch.float32)
    weight, norm = torch.randn(6, 27), torch.randn(27)
    yield "soft_split_linear", (x, weight, weight[:, 0], norm, norm, *split, 1e-5)
    yield "soft_split_linear_backward", (v, x, weight, norm, norm, *split, 1e-5, True)
    _, *saved = ops.performer_attention(k, q, v, w, 1e-8)
    yield "performer_attention", (k, q, v, w, 1e-8)
    yield "performer_attention_backward", (v, k, q, v, w, *saved, 1e-8)
    y, _, *saved = ops.token_attention(q, k, v, 0.3)
    yield "token_attention", (q, k, v, 0.3)
    yield "token_attention_backward", (v, q, k, v, y, *saved, 0.3)
    _, *saved = ops.performer_layer(x, *performer, seed, *split, 1e-8, 0.1)
    yield "performer_layer", (x, *performer, seed, *split, 1e-8, 0.1)
    yield "performer_layer_backward", (v, x, *performer, seed, *saved, *split, 1e-8, 0.1, True)
    _, *saved = ops.transformer_layer(x, *transformer, *split, 0.3)
    yield "transformer_layer", (x, *transformer, *split, 0.3)
    yield "transformer_layer_backward", (v, x, *transformer, *saved, *split, 0.3, True)


def test_operators_refuse_every_tensor_that_is_too_small():
    for operator, arguments in operator_calls():
        call = getattr(torch.ops.t2t_cpu, operator)
        call(*arguments)
        for i, tensor in enumerate(arguments):
            if not isinstance(tensor, torch.Tensor):
                continue
            dim = min(1, tensor.dim() - 1)
            smaller = tensor.narrow(dim, 0, tensor.shape[dim] - 1)
            with pytest.raises(RuntimeError, match=operator.removesuffix("_backward") + ": "):
                call(*arguments[:i], smaller, *arguments[i + 1 :])
                pytest.fail(f"{operator} takes argument {i} of shape {tuple(smaller.shape)}")
