"""Code that Triton's compiler refuses must also fail in the interpreter; signatures of kernels."""

import importlib

import pytest
import torch

from t2t_kernels import backends

if not backends.INTERPRETED or backends.why_unavailable("triton") is not None:
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from t2t_kernels._triton import dot
from t2t_kernels.backends import OPERATIONS


@triton.jit
def multiply_kernel(p_a, p_b, p_c):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(p_c + o, dot(tl.load(p_a + o), tl.load(p_b + o), tl.zeros([16, 16], tl.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_different_dtypes_is_refused(dtype):
    a, result = torch.randn(16, 16), torch.empty(16, 16)
    multiply_kernel[(1,)](a, a, result)
    torch.testing.assert_close(result, a @ a)
    with pytest.raises(InterpreterError, match="different dtypes"):
        multiply_kernel[(1,)](a, a.to(dtype), result)


@pytest.mark.parametrize("name", [*sorted(OPERATIONS), "_triton", "_triton.matrix", "_triton.tail"])
def test_kernels_have_at_most_20_arguments(name):
    module = importlib.import_module(
        f"t2t_kernels.{name}" + ("" if "_triton" in name else ".triton")
    )
    kernels = {key: value for key, value in vars(module).items() if key.endswith("_kernel")}
    assert kernels
    assert {
        key: len(value.arg_names) for key, value in kernels.items() if len(value.arg_names) > 20
    } == {}
