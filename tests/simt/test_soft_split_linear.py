"""soft_split_linear's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.kernels.test_soft_split_linear import arguments, assert_parity
from tests.simt.build import build_host_library
from tests.simt.mutations import build_mutated, differs
from tests.simt.test_soft_split import channels_of_a_wider_map, nchw, nhwc, nhwc_misaligned

pytestmark = pytest.mark.usefixtures("poisoned")

# Map, kernel_size, stride, padding, outputs, layout: each for a path of the kernels.
CASES = {
    "token-larger-than-shared-memory": ((1, 64, 8, 7), (7, 4, 2), 40, nhwc),
    "large-token-of-single-elements": ((1, 70, 8, 7), (7, 4, 2), 40, nchw),
    "two-rounds-of-outputs": ((2, 16, 6, 9), (3, 2, 1), 384, nhwc),
    "outputs-off-vectors": ((1, 16, 6, 9), (3, 2, 1), 203, nhwc),
    "pixels-off-vectors": ((1, 32, 7, 8), (3, 2, 1), 24, nhwc_misaligned),
    "pixels-apart": ((2, 32, 7, 8), (3, 2, 1), 24, channels_of_a_wider_map),
    "planes": ((2, 32, 7, 8), (3, 2, 1), 24, nchw),
    "several-slots": ((3, 3, 67, 65), (3, 2, 1), 8, nchw),
    "many-channels": ((1, 96, 5, 4), (3, 2, 1), 16, nhwc),
    "one-tap": ((2, 16, 3, 5), (1, 1, 0), 8, nhwc),
    "one-output": ((1, 3, 9, 9), (3, 2, 1), 1, nchw),
}


def name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    shape, split, outputs, layout = CASES[case]
    tensors = arguments(shape, split, outputs, True, True, dtype, torch.device("cpu"))
    assert_parity(tensors, split, "cuda", layout)


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    tensors = arguments(
        (2, 16, 7, 9), (3, 2, 1), 70, True, True, torch.float16, torch.device("cpu")
    )
    assert_parity(tensors, (3, 2, 1), "cuda", nhwc)


# A statement that a slip drops, or an expression and what a slip would make of it.
SLIPS = {
    "copies-not-waited-for": (
        "patches.cuh",
        "wait_for_copies<0>();\n    __syncwarp();\n  }\n\n  // Tokens first_token",
        "",
    ),
    "products-before-all-lanes-normalised": ("patches.cuh", "__syncwarp();\n  }\n};", ""),
    "moments-of-one-element-too-few": (
        "patches.cuh",
        "unit * V + e < count",
        "unit * V + e + 1 < count",
    ),
    "zeros-below-the-map-missing": (
        "patches.cuh",
        "static_cast<unsigned>(p.map.height)",
        "static_cast<unsigned>(p.map.height + 1)",
    ),
    "elements-in-the-wrong-order": (
        "patches.cuh",
        "p.by_tap ? rest : quotient",
        "p.by_tap ? rest : rest",
    ),
    "gain-of-another-element": (
        "patches.cuh",
        "exists ? p.own(element) : 0",
        "exists ? element : 0",
    ),
    "rows-of-a-fragment-swapped": (
        "mma.cuh",
        "lane % 16 * pitch + lane / 16 * 8",
        "(lane % 16 ^ 8) * pitch + lane / 16 * 8",
    ),
    "depths-of-a-fragment-swapped": (
        "mma.cuh",
        "lane % 16 * pitch + lane / 16 * 8",
        "lane % 16 * pitch + (1 - lane / 16) * 8",
    ),
    "columns-dealt-otherwise": (
        "mma.cuh",
        "column / 8 * 2 + column % 2",
        "column / 8 + column % 2 * 4",
    ),
    "tokens-of-a-fragment-swapped": (
        "mma.cuh",
        "lane % 8 + lane / 16 * 8",
        "lane % 8 + lane / 8 % 2 * 8",
    ),
    "bias-of-the-last-outputs-missing": ("soft_split_linear.cu", "if (p.bias) {", ""),
    "mean-not-summed-over-lanes": (
        "soft_split_linear.cu",
        "mean[half] += __shfl_xor_sync(kAllLanes, mean[half], distance);",
        "",
    ),
    "gradient-tile-not-waited-for": (
        "soft_split_linear.cu",
        "__syncthreads();\n    if (p.scalars) {",
        "",
    ),
    "gradient-tile-overwritten": (
        "soft_split_linear.cu",
        "__syncthreads();\n    for (int i = thread",
        "",
    ),
    "slot-misses-its-last-token": (
        "soft_split_linear.cu",
        "token < end ? token : p.tokens",
        "token + 1 < end ? token : p.tokens",
    ),
    "slot-left-out": (
        "soft_split_linear.cu",
        "slot < p.slot_count",
        "slot < p.slot_count - (slot > 0)",
    ),
    "parts-added-before-they-are-there": (
        "soft_split_linear.cu",
        "__syncthreads();\n  if (threadIdx.x == 0)",
        "",
    ),
    "stage-not-waited-for": (
        "soft_split_linear.cu",
        "wait_for_copies<1>();\n      __syncwarp();",
        "",
    ),
    "stage-overwritten": ("soft_split_linear.cu", "__syncwarp();\n      if (step - tap", ""),
    "token-row-too-far": ("soft_split_linear.cu", "token_row < map.rows", "token_row <= map.rows"),
    "taps-of-another-class": (
        "soft_split_linear.cu",
        "(first_y + map.padding) % map.stride",
        "first_y % map.stride",
    ),
}


@pytest.fixture(scope="module")
def mutate(cuda_on_host, host_cache, tmp_path_factory):
    choose, end = build_mutated(
        host_cache,
        tmp_path_factory.mktemp("mutated"),
        ["soft_split_linear.cu"],
        list(SLIPS.values()),
        ["soft_split_linear", "soft_split_linear_backward"],
    )
    yield choose
    end()


def results(ops, dtype):
    """Of both operators, on maps that take every kernel through most of its paths."""
    for shape, split, outputs, layout in (
        ((2, 16, 6, 9), (3, 2, 1), 197, nhwc),
        ((3, 3, 31, 30), (3, 1, 1), 24, nchw),
    ):
        x, weight, bias, *norm = arguments(shape, split, outputs, True, True, dtype, "cpu")
        y = ops.soft_split_linear(layout(x), weight, bias, *norm, *split, 1e-5)
        yield y
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        yield from ops.soft_split_linear_backward(
            grad, layout(x), weight, *norm, *split, 1e-5, True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_no_slip_changes_nothing(mutate, dtype):
    mutate(-1)
    assert not differs(results, dtype)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_noticed(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.bfloat16) or differs(results, torch.float32)
