"""performer_attention's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.kernels.test_performer_attention import arguments, assert_parity
from tests.simt.build import build_host_library
from tests.simt.mutations import build_mutated, differs
from tests.simt.test_soft_split import name

pytestmark = pytest.mark.usefixtures("poisoned", "cuda_backend")

# B, T, E, m, each for a path of the kernels.
CASES = {
    "widest": (2, 40, 64, 64),
    "one-group-of-many-features": (1, 33, 24, 56),
    "rows-off-vectors": (3, 17, 33, 17),
    "several-tiles-of-a-warp": (3, 400, 8, 40),
    "one-of-each": (2, 3, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    assert_parity(*arguments(CASES[case], 0.5, dtype, "cpu"), 1e-3, "cuda")


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    assert_parity(*arguments((2, 70, 40, 48), 1.0, torch.float32, "cpu"), 1e-8, "cuda")


PERFORMER, ATTENTION = "performer.cuh", "performer_attention.cu"
# A statement that a slip drops, or an expression and what a slip would make of it.
SLIPS = {
    "keys-not-limited": (PERFORMER, "limit ? within_range(values[e]) : values[e]", "values[e]"),
    "tokens-beyond-the-last-count": (
        PERFORMER,
        "sum_row(half) >= tokens",
        "sum_row(half) > tokens",
    ),
    "half-of-the-square-missing": (PERFORMER, "x.at[j] * x.at[j]", "x.at[j]"),
    "sums-not-shrunk": (PERFORMER, "shrink[sums.row(i / 2, i % 2)]", "1.f"),
    "features-before-they-are-there": (
        PERFORMER,
        "__syncwarp();\n    const int lane = lane_index();",
        "",
    ),
    "shrink-before-it-is-there": (
        PERFORMER,
        "__syncwarp();\n#pragma unroll\n    for (int i = 0; i < 4; ++i)",
        "",
    ),
    "maximum-of-another-feature": (
        PERFORMER,
        "feature < w.count ? keys.maximum[feature] : -INFINITY",
        "feature < w.count ? keys.maximum[feature ^ 1] : -INFINITY",
    ),
    "top-of-one-lane": (PERFORMER, "top[i] = largest_of_row(top[i]);", ""),
    "eps-forgotten": (
        PERFORMER,
        "sum_of_row(divisor[i]) + result.slope[i]",
        "sum_of_row(divisor[i])",
    ),
    "products-before-features": (PERFORMER, "__syncwarp();\n  result.y.clear();", ""),
    "products-before-gradients": (
        PERFORMER,
        "__syncwarp();\n  Wide log_gradients;",
        "",
    ),
    "products-before-log-gradients": (PERFORMER, "__syncwarp();\n  result.clear();", ""),
    "tiles-overwritten": (PERFORMER, "__syncwarp();\n  keep_sums(features, value_tile", ""),
    "slope-forgotten": (
        PERFORMER,
        "of_divisor[0] * attended.slope[0]",
        "of_divisor[0]",
    ),
    "part-left-out": (PERFORMER, "i < p.parts_per_image", "i < p.parts_per_image - (i > 0)"),
    "tiles-loaded-too-early": (ATTENTION, "__syncwarp();\n    load_tile<T>(p.keys", ""),
    "tiles-used-too-early": (ATTENTION, "__syncwarp();\n    running.add", ""),
    "gradients-summed-too-early": (ATTENTION, "__syncthreads();\n    sums.add", ""),
    "gradients-overwritten": (ATTENTION, "__syncthreads();\n  }\n  sums.store", ""),
}


@pytest.fixture(scope="module")
def mutate(cuda_on_host, host_cache, tmp_path_factory):
    choose, end = build_mutated(
        host_cache,
        tmp_path_factory.mktemp("mutated"),
        ["performer_attention.cu"],
        list(SLIPS.values()),
        ["performer_attention", "performer_attention_backward"],
    )
    yield choose
    end()


def results(ops):
    """Of both operators, on tokens that take every kernel through most of its paths."""
    for sizes, rms in (((2, 230, 40, 48), 1.0), ((2, 37, 16, 16), 1e15)):
        (k, q, v), w = arguments(sizes, rms, torch.float32, "cpu")
        k[0, 0] *= 100
        y, *sums = ops.performer_attention(k, q, v, w, 1e-3)
        yield from (y, *sums)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        yield from ops.performer_attention_backward(grad, k, q, v, w, *sums, 1e-3)


def test_no_slip_changes_nothing(mutate):
    mutate(-1)
    assert not differs(results)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_noticed(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results)
