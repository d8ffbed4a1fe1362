"""Code that differs for Hopper, run on the CPU: products by warpgroup."""

import ctypes

import pytest
import torch

from t2t_kernels import library
from t2t_kernels.backends import BACKENDS, Backend
from t2t_kernels.backends import OPERATIONS as ALL_OPERATIONS
from t2t_kernels.token_attention import ops as contract
from tests.support.cuda import (
    performer_layer,
    soft_split_linear,
    token_attention,
    transformer_layer,
)
from tests.support.cuda.build import HOPPER, build_host_library
from tests.support.cuda.mutations import build_mutated, differs
from tests.support.kernels.token_attention import assert_parity
from tests.support.names import name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned", "cuda_backend", "hopper")]

NAMESPACE = "t2t_hopper"
OPERATIONS = ("token_attention", "transformer_layer", "performer_layer", "soft_split_linear")
SOURCES = [f"{operation}.cu" for operation in OPERATIONS]
SOFTMAX, MATRIX, OPERANDS = "softmax.cuh", "mma.cuh", "operands.cuh"
PROJECTION, TAIL, PERFORMER = "projection.cuh", "tail.cuh", "performer.cuh"
GRADIENT = "projection_gradient.cuh"
# Slips: a statement to drop, or an expression and its replacement.
SLIPS = {
    "tokens-not-swizzled": (SOFTMAX, "column ^ row % 8 * 8", "column"),
    "swizzle-of-64-bytes": (
        MATRIX,
        "kSwizzledOver128Bytes << 30",
        "2 * kSwizzledOver128Bytes << 30",
    ),
    "rows-at-another-distance": (MATRIX, "uint64_t(upper)", "uint64_t(upper - 32)"),
    "own-columns-of-another-step": (
        SOFTMAX,
        "operand_at(left.rows, step * 2)",
        "operand_at(left.rows)",
    ),
    "columns-of-another-step": (SOFTMAX, "operand_at(rows, step * 2)", "operand_at(rows)"),
    "rows-of-another-step": (SOFTMAX, "operand_at(rows, first * 8)", "operand_at(rows)"),
    "rows-of-another-group": (SOFTMAX, "own_rows + group_index() * kTile * kWidest", "own_rows"),
    "weighted-transposed": (SOFTMAX, "multiply_async<T, true>", "multiply_async<T, !true>"),
    "scores-added-to-what-was-there": (SOFTMAX, "step > 0", "true"),
    "scores-of-this-tile-again": (
        SOFTMAX,
        "block.tile_at(next, 0)",
        "block.tile_at(stage, 0)",
    ),
    "first-scores-not-started": (
        SOFTMAX,
        "start_scores(both[0], queries, block.tile_at(0, 0));",
        "",
    ),
    "first-scores-not-awaited": (SOFTMAX, "finish(both[0]);", ""),
    "tiles-not-shown": (SOFTMAX, "if constexpr (kHasWarpgroups) show_to_products();", ""),
    "tiles-used-too-early": (SOFTMAX, "__syncthreads();\n  }\n\n  __device__ static int f", ""),
    "tiles-overwritten": (SOFTMAX, "stage == kStages - 1", "stage >= kStages - 2"),
    "tiles-overwritten-after-the-last": (SOFTMAX, "wait_for_rows();\n  }\n};", ""),
    "groups-not-waited-for": (SOFTMAX, "wait_at(barrier_of(group), kThreads);", ""),
    "one-barrier-for-all-tiles": (SOFTMAX, "1 + 2 * waiting + turn", "1 + 2 * waiting"),
    "sums-not-released": (SOFTMAX, "start_products(sums.at[0]...);", ""),
    "weights-not-fenced": (SOFTMAX, "start_products(weights);", ""),
    "products-not-committed": (SOFTMAX, "commit_products();", ""),
    "products-not-awaited": (SOFTMAX, "wait_for_products(sums.at[0]...);", ""),
    "y-not-awaited": (SOFTMAX, "finish(y, both[1 - turn]);", ""),
    "gradients-of-queries-not-awaited": (SOFTMAX, "finish(grad_queries);", ""),
    "gradients-of-keys-not-awaited": (SOFTMAX, "finish(grad_keys, grad_values);", ""),
    "scores-not-awaited-backward": (
        SOFTMAX,
        "finish(scores, of_weights);\n      auto& s",
        "",
    ),
    "scores-of-keys-not-awaited": (
        SOFTMAX,
        "finish(scores, of_weights);\n      release",
        "",
    ),
    "warps-without-rows-left-out": (
        SOFTMAX,
        "first_of_block + group_index() * kTile < tokens",
        "first < tokens",
    ),
}
# The same for the projection and the tail.
LAYER_SLIPS = {
    "weight-not-swizzled": (OPERANDS, "(group * 4 + i) ^ (at % 8)", "group * 4 + i"),
    "columns-of-the-weight-swapped": (
        OPERANDS,
        "in_group / 8 * 2 + i % 2",
        "in_group / 8 * 2 + 1 - i % 2",
    ),
    "step-of-another-row": (
        OPERANDS,
        "step % 4 * 2",
        "step % 2 * 2",
    ),
    "piece-of-the-first-rows": (OPERANDS, "step / 4 * stride", "0"),
    "sums-taken-otherwise": (
        OPERANDS,
        "i / 16 * 4 + i % 8 / 2",
        "i / 16 * 4 + (i % 8 / 2 ^ 1)",
    ),
    "weight-of-rows-not-shown": (
        PROJECTION,
        "if constexpr (kHasWarpgroups) show_to_products();\n  __syncthreads();",
        "",
    ),
    "weight-of-rows-not-there": (PROJECTION, "__syncthreads();\n\n  const auto load", ""),
    "patches-of-rows-not-fenced": (
        PROJECTION,
        "start_products(wide, patches.patches.at);",
        "",
    ),
    "products-of-rows-not-committed": (
        PROJECTION,
        "commit_products();\n          wait_for_products",
        "",
    ),
    "products-of-rows-not-awaited": (PROJECTION, "wait_for_products(wide);\n          Sums", ""),
    "pieces-not-shown": (
        PROJECTION,
        "if constexpr (kHasWarpgroups) show_to_products();\n      // The piece",
        "",
    ),
    "pieces-not-there": (PROJECTION, "__syncthreads();\n      start_loading();", ""),
    "patches-of-taps-not-fenced": (PROJECTION, "start_products(wide, patches.at);", ""),
    "products-of-taps-not-committed": (
        PROJECTION,
        "commit_products();\n        wait_for_products",
        "",
    ),
    "products-of-taps-not-awaited": (PROJECTION, "wait_for_products(wide);\n      } else", ""),
    "weight-of-taps-not-shown": (
        GRADIENT,
        "if constexpr (kHasWarpgroups) show_to_products();\n    __syncthreads();",
        "",
    ),
    "stages-of-taps-not-shown": (
        GRADIENT,
        "if constexpr (kHasWarpgroups) show_to_products();\n        // The stage",
        "",
    ),
    "gradients-of-taps-not-fenced": (
        GRADIENT,
        "start_products(products, grads[0].at, grads[1].at, grads[2].at);",
        "",
    ),
    "products-of-gradients-not-committed": (
        GRADIENT,
        "commit_products();\n        wait_for_products(products)",
        "",
    ),
    "products-of-gradients-not-awaited": (GRADIENT, "wait_for_products(products);", ""),
    "patches-of-tokens-not-shown": (
        GRADIENT,
        "if constexpr (kHasWarpgroups) show_to_products();\n#pragma",
        "",
    ),
    "gradients-of-tokens-not-fenced": (GRADIENT, "start_products(sums, left);", ""),
    "products-of-tokens-not-committed": (
        GRADIENT,
        "commit_products();\n        wait_for_products(sums)",
        "",
    ),
    "products-of-tokens-not-awaited": (GRADIENT, "wait_for_products(sums);", ""),
    "operand-of-a-matrix-not-fenced": (OPERANDS, "start_products(wide, operand.at);", ""),
    "products-of-a-matrix-not-committed": (OPERANDS, "commit_products();", ""),
    "products-of-a-matrix-not-awaited": (OPERANDS, "wait_for_products(wide, operand.at);", ""),
    "matrix-of-the-other-direction": (
        OPERANDS,
        "multiply_async<T, kTransposed>",
        "multiply_async<T, !kTransposed>",
    ),
    "step-of-a-matrix-twice": (OPERANDS, "step * (kTransposed ? 16 * 8 : 2)", "0"),
    "weights-of-the-tail-not-shown": (
        TAIL,
        "if constexpr (kHasWarpgroups) show_to_products();",
        "",
    ),
    "w-not-shown": (
        PERFORMER,
        "if constexpr (kHasWarpgroups) show_to_products();\n}\n\n// rows",
        "",
    ),
    "means-not-shown": (
        PERFORMER,
        "if constexpr (kHasWarpgroups) show_to_products();\n  }\n\n  // The gradient",
        "",
    ),
}


def projected_results(ops, dtype):
    return soft_split_linear.results(ops, dtype, soft_split_linear.MAPS)


@pytest.fixture(scope="module")
def built(cuda_on_host, host_cache, tmp_path_factory):
    """Chooses a slip in the code for Hopper (−1 for none) and fixes the order of threads."""
    folder = tmp_path_factory.mktemp("hopper")
    choose, end = build_mutated(
        host_cache,
        folder,
        SOURCES,
        [*SLIPS.values(), *LAYER_SLIPS.values()],
        [operation + suffix for operation in OPERATIONS for suffix in ("", "_backward")],
        HOPPER,
        NAMESPACE,
    )
    library.register_gradient(
        NAMESPACE,
        "token_attention",
        contract.Arguments,
        contract._backward,
        contract._setup_context,
    )
    path = build_host_library(host_cache, [folder / source for source in SOURCES], HOPPER)
    yield choose, ctypes.CDLL(path).simt_seed
    end()


@pytest.fixture
def hopper(built, monkeypatch):
    """Makes the backend "cuda" use the code for Hopper."""
    hopper = Backend("cuda", devices=("cpu",), namespace=NAMESPACE)
    monkeypatch.setitem(BACKENDS, "cuda", hopper)
    built[0](-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("case", token_attention.CASES)
def test_parity(case, dtype):
    assert_parity(token_attention.arguments(token_attention.CASES[case], 1.0, dtype), 0.2, "cuda")


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(built, seed):
    built[1](ctypes.c_uint64(seed))
    assert_parity(token_attention.arguments((2, 70, 64), 2.0, torch.bfloat16), -0.3, "cuda")


def test_scores_of_minus_infinity():
    token_attention.assert_scores_may_be_minus_infinity(torch.bfloat16)


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_nan_reaches_the_same_elements_as_in_the_reference(which):
    token_attention.assert_nan_goes_where_the_reference_lets_it(torch.bfloat16, which)


RESULTS = dict(
    zip(
        OPERATIONS,
        (
            token_attention.results,
            transformer_layer.results,
            performer_layer.results,
            projected_results,
        ),
        strict=True,
    )
)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_sums_as_a_warp_alone(operation):
    """Sums are bit-identical, because both add the products of 16 terms in order in the host build."""
    every = (torch.float32, torch.bfloat16, torch.float16)
    taken = [dtype for dtype in every if ALL_OPERATIONS[operation].takes("cuda", dtype)]
    assert taken
    for dtype in taken:
        assert not differs(RESULTS[operation], dtype, namespace=NAMESPACE)


@pytest.mark.parametrize("case", soft_split_linear.MODELS)
def test_images_do_not_affect_each_other(case):
    soft_split_linear.assert_an_image_does_not_touch_another(getattr(torch.ops, NAMESPACE), case)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_found(built, slip):
    built[0](list(SLIPS).index(slip))
    assert differs(token_attention.results, torch.bfloat16, namespace=NAMESPACE)


@pytest.mark.parametrize("slip", LAYER_SLIPS)
def test_slip_of_a_layer_is_found(built, slip):
    built[0](len(SLIPS) + list(LAYER_SLIPS).index(slip))
    assert any(
        differs(results, torch.bfloat16, namespace=NAMESPACE)
        for results in (performer_layer.results, projected_results)
    )
