"""The softmax attention as nvcc compiles it for Hopper, run on the CPU: products by warpgroup."""

import ctypes
import functools

import pytest
import torch

from t2t_kernels import library
from t2t_kernels.token_attention import ops as contract
from tests.kernels.test_token_attention import assert_parity
from tests.simt import test_token_attention as common
from tests.simt import test_transformer_layer as layer
from tests.simt.build import HOPPER, build_host_library
from tests.simt.mutations import build_mutated, differs
from tests.simt.test_soft_split import name

pytestmark = pytest.mark.usefixtures("poisoned", "cuda_backend", "hopper")

NAMESPACE = "t2t_hopper"
OPERATIONS = ("token_attention", "transformer_layer")
SOURCES = ["token_attention.cu", "transformer_layer.cu", "soft_split_linear.cu"]
SOFTMAX, MATRIX = "softmax.cuh", "mma.cuh"
# A statement that a slip drops, or an expression and what a slip would make of it.
SLIPS = {
    "tokens-not-swizzled": (SOFTMAX, "column ^ row % 8 * 8", "column"),
    "swizzle-of-64-bytes": (
        MATRIX,
        "kSwizzledOver128Bytes << 62",
        "2 * kSwizzledOver128Bytes << 62",
    ),
    "rows-at-another-distance": (MATRIX, "kToNextEightRows << 32", "kToNextEightRows << 31"),
    "columns-of-another-step": (SOFTMAX, "k * kOperandColumns", "2 * k * kOperandColumns"),
    "rows-of-another-step": (SOFTMAX, "k * kOperandRows", "k * kOperandRows / 2"),
    "scores-of-the-transposed": (SOFTMAX, "multiply_async<T, false>", "multiply_async<T, !false>"),
    "weighted-transposed": (SOFTMAX, "multiply_async<T, true>", "multiply_async<T, !true>"),
    "scores-added-to-what-was-there": (SOFTMAX, "k > 0", "true"),
    "weights-of-the-other-rows": (
        SOFTMAX,
        "pair_of<T>(weights.at[0][i / 2][i % 2])",
        "pair_of<T>(weights.at[0][i / 2][0])",
    ),
    "tiles-not-shown": (SOFTMAX, "show_to_products();", ""),
    "tiles-used-too-early": (SOFTMAX, "__syncthreads();\n  }\n\n  // `use(begin", ""),
    "tiles-overwritten": (
        SOFTMAX,
        "load(begin + kTile<T>, turn ^ 1)",
        "load(begin + kTile<T>, turn)",
    ),
    "scores-not-fenced": (SOFTMAX, "start_products();", ""),
    "weights-not-fenced": (SOFTMAX, "start_products(sums.at[0], left);", ""),
    "scores-not-committed": (
        SOFTMAX,
        "commit_products();\n    wait_for_products(sums.at[0]);\n  } else if",
        "",
    ),
    "weighted-not-committed": (
        SOFTMAX,
        "commit_products();\n      wait_for_products(sums.at[0]);\n    } else {",
        "",
    ),
    "scores-not-awaited": (SOFTMAX, "wait_for_products(sums.at[0]);\n  } else if", ""),
    "weighted-not-awaited": (SOFTMAX, "wait_for_products(sums.at[0]);\n    } else {", ""),
    "warps-without-rows-left-out": (
        SOFTMAX,
        "warp_index() / kTogether<T> * kTogether<T>",
        "warp_index()",
    ),
}


@pytest.fixture(scope="module")
def built(cuda_on_host, host_cache, tmp_path_factory):
    """Chooses a slip, −1 for none, and fixes the order of threads, of the code for Hopper."""
    folder = tmp_path_factory.mktemp("hopper")
    choose, end = build_mutated(
        host_cache,
        folder,
        SOURCES,
        list(SLIPS.values()),
        [operation + suffix for operation in OPERATIONS for suffix in ("", "_backward")],
        HOPPER,
        NAMESPACE,
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::token_attention",
        functools.partial(contract._backward, getattr(torch.ops, NAMESPACE)),
        setup_context=contract._setup_context,
    )
    path = build_host_library(host_cache, [folder / source for source in SOURCES], HOPPER)
    yield choose, ctypes.CDLL(path).simt_seed
    end()


@pytest.fixture
def hopper(built, monkeypatch):
    """Lets the backend "cuda" be the code for Hopper."""
    monkeypatch.setitem(library.NAMESPACES, "cuda", NAMESPACE)
    built[0](-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("case", common.CASES)
def test_parity(case, dtype):
    assert_parity(common.arguments(common.CASES[case], 1.0, dtype), 0.2, "cuda")


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(built, seed):
    built[1](ctypes.c_uint64(seed))
    assert_parity(common.arguments((2, 70, 40), 2.0, torch.bfloat16), -0.3, "cuda")


def test_scores_of_minus_infinity():
    common.test_scores_of_minus_infinity(torch.bfloat16)


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_nan_goes_where_the_reference_lets_it(which):
    common.test_nan_goes_where_the_reference_lets_it(torch.bfloat16, which)


@pytest.mark.parametrize("results", [common.results, layer.results], ids=OPERATIONS)
def test_same_sums_as_a_warp_alone(results):
    """To the last bit: in the stand-in both add the products of 16 terms one after the other."""
    for dtype in (torch.float32, torch.bfloat16):
        assert not differs(results, dtype, namespace=NAMESPACE)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_noticed(built, slip):
    built[0](list(SLIPS).index(slip))
    assert differs(common.results, torch.bfloat16, namespace=NAMESPACE)
