"""soft_split_linear's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.support.cuda.build import build_host_library
from tests.support.cuda.layouts import (
    channels_of_a_wider_map,
    every_other_pixel,
    inside_nan,
    nchw,
    nhwc,
    nhwc_misaligned,
)
from tests.support.cuda.mutations import build_mutated, differs, multiprocessors
from tests.support.cuda.soft_split_linear import (
    MAPS,
    MODELS,
    assert_an_image_does_not_touch_another,
    results,
)
from tests.support.kernels.soft_split_linear import arguments, assert_parity

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]


def misaligned(x):
    return inside_nan(x, x.shape, x.contiguous().stride(), 1)


# Map, kernel_size, stride, padding, outputs, layout: each for a path of the kernels. Images, whose patches
# go row by row, and maps of a multiple of 64 channels, tap by tap.
CASES = {
    "image": ((2, 3, 22, 18), (7, 4, 2), 192, nchw),
    "image-of-one-channel": ((2, 1, 14, 12), (7, 2, 2), 8, nchw),
    "image-of-four-channels": ((1, 4, 13, 15), (7, 2, 3), 64, nchw),
    "image-of-odd-width": ((2, 3, 11, 13), (3, 2, 1), 192, nchw),
    "image-of-an-even-kernel": ((2, 3, 12, 12), (4, 2, 2), 24, nchw),
    "image-of-widest-rows": ((1, 3, 12, 12), (8, 2, 2), 24, nchw),
    "image-in-channels-last": ((2, 3, 12, 14), (7, 4, 2), 64, nhwc),
    "image-off-pairs": ((2, 3, 12, 14), (7, 4, 2), 64, misaligned),
    "image-of-every-other-pixel": ((2, 3, 12, 14), (7, 4, 2), 64, every_other_pixel),
    "several-rounds-of-an-image": ((5, 3, 25, 24), (3, 1, 1), 136, nchw),
    "image-of-two-channels": ((2, 2, 13, 12), (5, 3, 2), 40, nchw),
    "image-with-a-stride-over-the-kernel": ((2, 3, 17, 11), (2, 5, 0), 16, nchw),
    "image-of-most-classes": ((1, 3, 25, 24), (8, 8, 3), 64, nchw),
    "image-with-a-padding-over-the-kernel": ((1, 4, 4, 5), (2, 1, 3), 72, nchw),
    "several-blocks-of-columns": ((2, 3, 12, 14), (7, 4, 2), 384, nchw),
    "map": ((2, 64, 9, 8), (3, 2, 1), 192, nhwc),
    "map-of-planes": ((2, 64, 9, 8), (3, 2, 1), 64, nchw),
    "map-off-vectors": ((2, 64, 7, 8), (3, 2, 1), 64, nhwc_misaligned),
    "map-of-a-wider-one": ((2, 64, 7, 8), (3, 2, 1), 136, channels_of_a_wider_map),
    "map-of-two-pieces": ((1, 128, 5, 6), (3, 2, 1), 192, nhwc),
    "map-of-stride-one": ((2, 64, 6, 5), (2, 1, 1), 8, nhwc),
    "map-of-stride-three": ((1, 64, 9, 8), (3, 3, 1), 24, nhwc),
    "map-through-the-ring": ((2, 64, 9, 8), (3, 1, 1), 192, nhwc),
    "map-of-more-outputs": ((1, 64, 9, 8), (3, 2, 1), 448, nhwc),
    "map-of-a-wide-reach": ((1, 64, 9, 8), (5, 1, 2), 200, nhwc),
    "map-of-one-tap": ((2, 64, 5, 4), (1, 2, 0), 40, nhwc),
    "map-of-one-pixel": ((17, 64, 1, 1), (1, 1, 0), 8, nhwc),
    "several-blocks-of-outputs": ((1, 64, 7, 7), (3, 2, 1), 384, nhwc),
    "several-rounds-of-a-map": ((6, 64, 13, 12), (2, 1, 1), 8, nhwc),
}


def name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 1), (torch.float16, 9)], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype, count, norm):
    shape, split, outputs, layout = CASES[case]
    tensors = arguments(shape, split, outputs, norm, True, dtype, torch.device("cpu"))
    with multiprocessors(count):
        assert_parity(tensors, split, "cuda", layout)


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("channels", "split"), [(3, (7, 4, 2)), (64, (3, 2, 1))])
def test_flat_maps(channels, split, value):
    """In the interior, the variance of a patch is zero; at the edge it contains zeros."""
    tensors = arguments((1, channels, 15, 14), split, 64, True, True, torch.bfloat16, "cpu")
    tensors[0].fill_(value)
    assert_parity(tensors, split, "cuda")


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("scale", [1e-3, 3e3])
@pytest.mark.parametrize(("channels", "split"), [(3, (7, 4, 2)), (64, (3, 2, 1))])
def test_small_and_large_maps(channels, split, scale):
    tensors = arguments((1, channels, 15, 14), split, 64, True, True, torch.float16, "cpu")
    # Far from zero, and next to one another.
    tensors[0].mul_(0.1 * scale).add_(2 * scale)
    assert_parity(tensors, split, "cuda")


@pytest.mark.parametrize("case", MODELS)
def test_images_do_not_affect_each_other(cuda_on_host, case):
    assert_an_image_does_not_touch_another(torch.ops.t2t_cuda, case)


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads(host_cache, seed, case):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    channels, split, outputs = MODELS[case]
    shape = (2, channels, 14, 12) if channels == 3 else (2, channels, 7, 9)
    tensors = arguments(shape, split, outputs, True, True, torch.float16, torch.device("cpu"))
    assert_parity(tensors, split, "cuda", nhwc)


PATCHES, PROJECTION = "patch_operands.cuh", "projection.cuh"
GRADIENT = "projection_gradient.cuh"
# Slips: a statement to drop, or an expression and its replacement.
SLIPS = {
    # Patches,
    "deviations-from-zero": (PATCHES, "element.x - reference[half]", "element.x"),
    "deviations-not-summed": (PATCHES, "squares[half] += second * second;", ""),
    "variance-about-the-reference": (
        PATCHES,
        "sum_of_row(squares[half]) * share - mean * mean",
        "sum_of_row(squares[half]) * share",
    ),
    "places-beyond-the-rows-not-filled": (PATCHES, "row < p.rows ? beyond : 0xFFFFFFFFu", "beyond"),
    "zeros-below-the-image-missing": (
        PATCHES,
        "static_cast<unsigned>(p.height)",
        "static_cast<unsigned>(p.height + 1)",
    ),
    "zeros-beside-the-image-missing": (
        PATCHES,
        "static_cast<unsigned>(p.width)",
        "static_cast<unsigned>(p.width + 1)",
    ),
    "pairs-swapped": (PATCHES, "t * 2 + e % 2", "t * 2 + 1 - e % 2"),
    "token-of-another-row": (PATCHES, "in_image - row * p.columns.divisor", "in_image"),
    "column-of-taps-left-out": (
        PATCHES,
        "++column_ == map_.kernel",
        "(column_ += 2) >= map_.kernel",
    ),
    "second-channels-of-a-tap-left-out": (PATCHES, "channel_ == channels_", "true"),
    "last-piece-without-moments": (PATCHES, "if (piece + 1 < pieces) loaded", ""),
    "taps-and-channels-swapped": (
        PATCHES,
        "(element - tap * channels) * p.kernel * p.kernel + tap",
        "element",
    ),
    # projection,
    "offset-forgotten": (
        PROJECTION,
        "constant += elements[e] * static_cast<float>(static_cast<const T*>(p.offset)[own]);",
        "",
    ),
    "bias-forgotten": (PROJECTION, "exists && p.bias", "false"),
    "fold-of-one-lane": (
        PROJECTION,
        "constant += __shfl_xor_sync(kAllLanes, constant, distance);",
        "",
    ),
    "weight-not-waited-for": (PROJECTION, "wait_for_copies<0>();\n  if constexpr", ""),
    "weight-of-other-threads-not-waited-for": (
        PROJECTION,
        "__syncthreads();\n\n  const auto load",
        "",
    ),
    "moments-of-rows-not-stored": (
        PROJECTION,
        "store_moments<T>(p, token, moments);\n    } else",
        "",
    ),
    "piece-not-waited-for": (PROJECTION, "wait_for_copies<1>();", ""),
    "piece-of-other-threads-not-waited-for": (
        PROJECTION,
        "__syncthreads();\n      start_loading();",
        "",
    ),
    "moments-of-taps-not-stored": (
        PROJECTION,
        "store_moments<T>(p, token, moments);\n    }\n    PatchTaps",
        "",
    ),
    "stages-out-of-step": (PROJECTION, "stage + 1 < kStages ? stage + 1 : 0", "stage ^ 1"),
    "columns-of-the-first-block": (
        PROJECTION,
        "int64_t(piece) * p.column_tiles + blockIdx.y * kProjectTiles",
        "int64_t(piece) * p.column_tiles",
    ),
    "tile-of-tokens-left-out": (
        PROJECTION,
        "store_projected<T>(p, token + tile * kRows, group, sums[tile])",
        "store_projected<T>(p, token, group, sums[tile])",
    ),
    # gradient of the parameters,
    "elements-not-normalised": (
        GRADIENT,
        "if (normalized) pairs[i] = normalized_pair<T>(pairs[i], moments.x, moments.y);",
        "",
    ),
    "moments-of-another-token": (
        GRADIENT,
        "if (normalized && token < p.map.token_count) moments",
        "",
    ),
    "gradients-not-waited-for": (GRADIENT, "wait_for_copies<1>();\n      // The half", ""),
    "tiles-not-waited-for": (GRADIENT, "__syncthreads();\n      start_loading(first_token", ""),
    "tiles-overwritten": (
        GRADIENT,
        "__syncthreads();\n  }\n  wait_for_copies<0>();\n\n  // (elements",
        "",
    ),
    "rows-of-patches-swapped": (
        GRADIENT,
        "half + k + lane % 16",
        "half + k + (lane % 16 ^ 8)",
    ),
    "columns-of-gradients-swapped": (
        GRADIENT,
        "output + lane / 8 % 2 * 8",
        "output + (1 - lane / 8 % 2) * 8",
    ),
    "pieces-of-the-block-before": (
        GRADIENT,
        "(blockIdx.y * kTapsOfBlock + third) * kTapChannels",
        "(blockIdx.y * kTapsOfBlock + third - (blockIdx.y > 0)) * kTapChannels",
    ),
    "gradients-out-of-step": (
        GRADIENT,
        "buffer = buffer + 1 < kGradientBuffers ? buffer + 1 : 0",
        "buffer ^= 1",
    ),
    "bias-of-other-outputs": (GRADIENT, "i == of_bias", "i == 2 - of_bias"),
    "slots-by-four-left-out": (GRADIENT, "sums[j] += from[(i + j) * slot];", ""),
    "last-slots-left-out": (
        GRADIENT,
        "i + j < p.slot_count",
        "i + j < p.slot_count - (p.slot_count > 1)",
    ),
    "offset-not-in-the-weight": (GRADIENT, "gain * sum + offset * bias", "gain * sum"),
    "gradient-of-the-offset-forgotten": (GRADIENT, "grad_offset += weight * bias;", ""),
    "sums-of-warps-not-waited-for": (GRADIENT, "__syncthreads();\n  if (threadIdx.x == 0)", ""),
    # and of the map.
    "constants-forgotten": (GRADIENT, "grad[e] * (y[e] - constants[e])", "grad[e] * y[e]"),
    "mean-of-the-gradient-forgotten": (GRADIENT, "mean += grad[e] * sums[e];", ""),
    "mean-of-the-patch-forgotten": (
        GRADIENT,
        "moments.y * (mean - slope * moments.x)",
        "moments.y * mean",
    ),
    "gain-not-in-the-taps": (
        GRADIENT,
        "static_cast<float>(*weight) * gain",
        "static_cast<float>(*weight)",
    ),
    "taps-not-waited-for": (GRADIENT, "wait_for_copies<0>();\n    if constexpr", ""),
    "taps-of-other-threads-not-waited-for": (
        GRADIENT,
        "__syncthreads();\n  }\n\n  const int pixels",
        "",
    ),
    "stage-of-the-ring-not-waited-for": (GRADIENT, "wait_for_copies<kMapStages - 2>();", ""),
    "stage-of-the-ring-overwritten": (GRADIENT, "__syncthreads();\n        start_loading();", ""),
    "stages-of-the-ring-out-of-step": (
        GRADIENT,
        "stage + 1 < (resident ? steps : kMapStages)",
        "stage + 1 < steps",
    ),
    "taps-of-another-class": (
        GRADIENT,
        "(first_x + map.padding) % map.stride",
        "first_x % map.stride",
    ),
    "token-of-another-tap": (GRADIENT, "at.row - high", "at.row"),
    "token-row-too-far": (GRADIENT, "row >= 0 && row < map.rows", "row >= 0 && row < map.rows - 1"),
    "piece-of-other-outputs": (
        GRADIENT,
        "piece * kMapOutputs + lane_index() % 4 * 8",
        "lane_index() % 4 * 8",
    ),
    "scalars-of-every-piece": (GRADIENT, "piece == 0", "true"),
    "constant-of-the-pixel-forgotten": (GRADIENT, "constants[half] = scalars.y;", ""),
    "slope-of-the-pixel-forgotten": (GRADIENT, "slopes[half] = scalars.z;", ""),
    "deviation-forgotten": (GRADIENT, "factors[half] = scalars.x;", ""),
    "pixels-of-the-round-before": (GRADIENT, "if (step + 1 == steps) find(", ""),
    "rounds-of-pixels-left-out": (
        GRADIENT,
        "of_block < pixels",
        "of_block < pixels - (of_block >= blocks * kMapPixels) * 999",
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


def test_no_slip_changes_nothing(mutate):
    mutate(-1)
    assert not differs(results, torch.bfloat16, MAPS)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_found(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.bfloat16, MAPS)
