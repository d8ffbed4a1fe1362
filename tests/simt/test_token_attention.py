"""token_attention's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.support.cuda.build import build_host_library
from tests.support.cuda.mutations import build_mutated, differs
from tests.support.cuda.token_attention import (
    CASES,
    arguments,
    assert_nan_goes_where_the_reference_lets_it,
    assert_scores_may_be_minus_infinity,
    results,
)
from tests.support.kernels.token_attention import assert_parity
from tests.support.names import name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned", "cuda_backend")]

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    assert_parity(arguments(CASES[case], 1.0, dtype), 0.2, "cuda")


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    assert_parity(arguments((2, 70, 64), 2.0, torch.bfloat16), -0.3, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_scores_of_minus_infinity(dtype):
    assert_scores_may_be_minus_infinity(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_nan_reaches_the_same_elements_as_in_the_reference(dtype, which):
    assert_nan_goes_where_the_reference_lets_it(dtype, which)


@pytest.mark.parametrize(
    ("embed", "dtype", "message"),
    [
        (65, torch.bfloat16, r"expected \(B, T, 64\)"),
        (32, torch.float16, r"expected \(B, T, 64\)"),
        (64, torch.float32, "expected bfloat16 or float16"),
    ],
)
def test_unsupported_arguments(embed, dtype, message):
    """The check of the operator; the public function would choose another backend."""
    x = torch.zeros(1, 2, embed, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.t2t_cuda.token_attention(x, x, x, 1.0)


SOURCE = "softmax.cuh"
# Slips: a statement to drop, or an expression and its replacement.
SLIPS = {
    "copies-not-waited-for": ("wait_for_copies<0>();", ""),
    "tiles-used-too-early": ("__syncthreads();\n  }\n\n  __device__ static int f", ""),
    "tiles-overwritten": ("wait_for_rows();\n  }\n\n  // `use", ""),
    "groups-not-waited-for": ("wait_at(barrier_of(group), kThreads);", ""),
    "one-barrier-for-all-tiles": ("1 + 2 * waiting + turn", "1 + 2 * waiting"),
    "group-that-does-not-arrive": ("i < kGroups", "i < kGroups - 1"),
    "last-token-left-out": ("begin >= tokens", "begin >= tokens - 1"),
    "next-tile-in-this-one's-place": ("stage == kStages - 1", "stage >= kStages - 2"),
    "second-tile-not-fetched": ("load(kTile, 1);\n    int stage", ""),
    "second-tile-not-fetched-backward": ("load(kTile, 1);\n    // A group's", ""),
    "row-beyond-the-last": ("row + i < tokens", "row + i < tokens + 1"),
    "rows-of-another-step": ("from += step", "from += step / 2"),
    "tile-of-the-other-matrix": ("group_index() == 0 ? left : right", "left"),
    "left-fragments-exchanged": (
        "place(lane_index() % 16, k * 16 + lane_index() / 16 * 8)",
        "place(lane_index() % 8 + lane_index() / 16 * 8, k * 16 + lane_index() / 8 % 2 * 8)",
    ),
    "right-fragments-exchanged": (
        "place(row, step * 16 + column)",
        "place(row ^ 8, step * 16 + column)",
    ),
    "right-fragments-exchanged-2": (
        "place(row, j * 8 + column)",
        "place(row ^ 8, j * 8 + column)",
    ),
    "staged-rows-overwritten": (
        "__syncwarp();\n#pragma unroll\n    for (int i = 0; i < kWidest / 4",
        "",
    ),
    "rows-before-they-are-staged": ("__syncwarp();\n  }\n\n  // To the block's image", ""),
    "last-row-not-stored": (
        "block.first + row >= block.tokens",
        "block.first + row >= block.tokens - 1",
    ),
    "scores-not-scaled": ("score = __fmul_rn(score, factor);", ""),
    "keys-beyond-the-last": ("if (key >= block.tokens) s[i / 4][i / 2 % 2][i % 2] = -INF", ""),
    "maximum-of-one-lane": ("larger[half] = largest_of_row(larger[half]);", ""),
    "maximum-of-one-row-alone": ("larger[1] > maximum[1]", "false"),
    "normalizer-not-shrunk": ("normalizer[half] *= shrink;", ""),
    "normalizer-of-one-lane": ("normalizer[half] = sum_of_row(normalizer[half]);", ""),
    "shrunk-from-nothing": ("maximum[half] == -INFINITY", "false"),
    "weights-of-the-other-rows": ("s[key / 8 + i / 2][i % 2][e]", "s[key / 8 + i / 2][0][e]"),
    "delta-of-one-lane": ("sum_of_row(delta)", "delta"),
    "keys-beyond-the-last-backward": (
        "if (key >= block.tokens) s[i / 4][i / 2 % 2][i % 2] = not",
        "",
    ),
    "shift-of-another-image": ("block.image * rows_of_image", "0"),
    "shift-of-another-stage": (
        "&shifts[stage][slice + scores.column(wide)]",
        "&shifts[0][slice + scores.column(wide)]",
    ),
    "delta-of-the-other-column": ("slope[1] - both.w", "slope[1] - both.y"),
}


@pytest.fixture(scope="module")
def mutate(cuda_on_host, host_cache, tmp_path_factory):
    choose, end = build_mutated(
        host_cache,
        tmp_path_factory.mktemp("mutated"),
        ["token_attention.cu"],
        [(SOURCE, *slip) for slip in SLIPS.values()],
        ["token_attention", "token_attention_backward"],
    )
    yield choose
    end()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_slip_changes_nothing(mutate, dtype):
    mutate(-1)
    assert not differs(results, dtype)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_found(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.bfloat16)
