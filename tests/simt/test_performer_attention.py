"""performer_attention's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.support.cuda.build import build_host_library
from tests.support.cuda.mutations import build_mutated, differs, multiprocessors
from tests.support.kernels.performer_attention import arguments, assert_parity
from tests.support.names import name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned", "cuda_backend")]

# B, T, each for a path of the kernels, which take 64 elements and 32 features.
CASES = {
    "part-of-a-tile": (2, 3),
    "several-tiles-of-a-warp": (3, 401),
    "more-images-than-warps": (29, 33),
    "chunks-of-a-few-images": (2, 70),
    "one-token": (5, 1),
}
SIZES = (64, 32)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    assert_parity(*arguments((*CASES[case], *SIZES), 0.5, dtype, "cpu"), 1e-3, "cuda")


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    assert_parity(*arguments((2, 70, *SIZES), 1.0, torch.float16, "cpu"), 1e-8, "cuda")


def test_images_do_not_affect_each_other():
    """Tiles extend beyond the last token of an image, into the next one."""
    tensors, w = arguments((3, 37, *SIZES), 0.5, torch.bfloat16, "cpu")
    ops = torch.ops.t2t_cuda

    def results():
        y, *sums = ops.performer_attention(*tensors, w, 1e-3)
        grads = ops.performer_attention_backward(y.nan_to_num(), *tensors, w, *sums, 1e-3)
        return [tensor[[0, 2]] for tensor in (y, *sums, *grads)]

    alone = results()
    for tensor in tensors:
        tensor[1] = torch.nan
    assert all(map(torch.equal, alone, results()))


PERFORMER, ATTENTION, OPERANDS = "performer.cuh", "performer_attention.cu", "operands.cuh"
ROWS = "rows.cuh"
# Slips: a statement to drop, or an expression and its replacement.
SLIPS = {
    # The sums over keys.
    "keys-not-limited": (PERFORMER, "limited<T>(next_keys, at)", "next_keys"),
    "w-before-it-is-there": (
        PERFORMER,
        "__syncthreads();\n  const int64_t part = int64_t(blockIdx.x) * kAttentionWarps",
        "",
    ),
    "second-part-of-w-left-out": (PERFORMER, "i >= kFeatureRowVectors / 2", "false"),
    "values-before-they-are-there": (PERFORMER, "wait_for_copies<1>();", ""),
    "values-of-the-tile-before": (PERFORMER, "tiles + (turn ^ 1) * kRows * kEmbed", "tiles"),
    "values-beyond-the-last": (OPERANDS, "row < tokens - first", "true"),
    "tokens-beyond-the-last-count": (PERFORMER, "at + token < tokens", "true"),
    "half-square-of-another-token": (PERFORMER, "halves + token", "halves + (token ^ 2)"),
    "half-of-the-square-missing": (PERFORMER, "sums[1] += pair.y * pair.y;", ""),
    "maximum-of-one-lane": (PERFORMER, "largest = largest_of_row(largest);", ""),
    "sums-not-shrunk": (PERFORMER, "sums.at[i / 2][j][i % 2][1] *= factor[i / 2][i % 2];", ""),
    "normalizer-not-shrunk": (PERFORMER, "normalizer[i / 2][i % 2] *= factor[i / 2][i % 2];", ""),
    "rows-of-values-swapped": (
        OPERANDS,
        "token + lane_index() % 16",
        "token + (lane_index() % 16 ^ 8)",
    ),
    # Means of all parts.
    "part-left-out": (PERFORMER, "i < p.parts_per_image", "i < p.parts_per_image - (i > 0)"),
    "parts-not-shrunk": (PERFORMER, "normalizer * shrink", "normalizer"),
    "second-part-of-the-means-left-out": (
        PERFORMER,
        "part == 0 ? mean : remainder_of<T>(mean)",
        "part == 0 ? mean : 0.f",
    ),
    "first-part-of-a-product-twice": (PERFORMER, "blocks + 2 * kBlockVectors", "blocks"),
    "mean-of-another-feature": (
        PERFORMER,
        "block_place(feature, lane_index())",
        "block_place(feature ^ 1, lane_index())",
    ),
    "transposed-mean-of-another-feature": (
        PERFORMER,
        "block_place(lane_index(), feature)",
        "block_place(lane_index(), feature ^ 8)",
    ),
    # Queries.
    "queries-not-limited": (
        ATTENTION,
        "limited<T>(load_operand<T>(p.queries, image, first, tokens), first)",
        "load_operand<T>(p.queries, image, first, tokens)",
    ),
    "w-before-it-is-there-for-queries": (ATTENTION, "__syncthreads();", ""),
    "second-part-of-w-left-out-for-queries": (PERFORMER, "row >= kFeatures", "false"),
    "second-part-of-w-not-added": (
        OPERANDS,
        "sums.at[tile / 4 % kGroups]",
        "sums.at[tile / 4 % 1]",
    ),
    "means-of-the-first-image": (
        ATTENTION,
        "p.means.as_is + image * kMeanVectors",
        "p.means.as_is",
    ),
    "log-of-another-key": (
        PERFORMER,
        "logs_of_keys + lane_index() % 4 * 8",
        "logs_of_keys + (lane_index() % 4 ^ 1) * 8",
    ),
    "top-of-one-lane": (PERFORMER, "top[i] = largest_of_row(top[i]);", ""),
    "eps-forgotten": (PERFORMER, "divisor[i] = result.slope[i]", "divisor[i] = 0.f"),
    "features-not-in-the-divisor": (
        PERFORMER,
        "add_row_sums<T>(divisor, result.features.at[0]);",
        "",
    ),
    # Gradient of queries.
    "queries-not-limited-backward": (PERFORMER, "limited<T>(upcoming, first)", "upcoming"),
    "queries-of-the-same-tile-again": (PERFORMER, "first + kBlockTokens", "first"),
    "w-and-means-before-they-are-there": (PERFORMER, "__syncthreads();\n      sums_.clear();", ""),
    "means-of-the-first-image-backward": (
        PERFORMER,
        "p_.means.transposed + image * kMeanVectors",
        "p_.means.transposed",
    ),
    "parts-of-the-means-swapped-backward": (PERFORMER, "block / 2 * kFeatures", "0"),
    "divisor-of-one-lane": (PERFORMER, "sum_of_row(of_divisor[i])", "of_divisor[i]"),
    "divisor-not-divided": (PERFORMER, "of_queries.inverse[i]", "1.f"),
    "slope-forgotten": (PERFORMER, "of_divisor[0] * of_queries.slope[0]", "of_divisor[0]"),
    "slope-of-the-lower-rows-forgotten": (
        PERFORMER,
        "of_divisor[1] * of_queries.slope[1]",
        "of_divisor[1]",
    ),
    "normalizer-misses-odd-features": (
        PERFORMER,
        "of_normalizer[i % 4 * 2 + 1] += pair.y * of_divisor[half];",
        "",
    ),
    "normalizer-of-half-the-rows": (ROWS, "upper ? sums[i] : sums[i + count]", "0.f"),
    "normalizer-of-another-feature": (
        PERFORMER,
        "feature % 8 * 4 + feature / 8",
        "feature / 8 * 8 + feature % 8",
    ),
    "normalizer-of-the-part-before": (PERFORMER, "of_normalizer_[threadIdx.x] = 0.f;", ""),
    "sums-of-the-part-before": (PERFORMER, "sums_.clear();", ""),
    "tiles-overwritten": (
        PERFORMER,
        "__syncthreads();\n    const int row = warp_index() * kRows * kEmbed;",
        "",
    ),
    "tiles-before-they-are-there": (PERFORMER, "__syncthreads();\n    multiply_tiles", ""),
    "no-gradient-through-the-square": (PERFORMER, "to[0] += pair.x * factor[half];", ""),
    "gradient-beyond-the-limit": (PERFORMER, "stop_at_limit<T>(result, z);", ""),
    # Gradients of keys and values.
    "keys-not-limited-backward": (
        PERFORMER,
        "limited<T>(load_operand<T>(p.keys, image, first, tokens), first)",
        "load_operand<T>(p.keys, image, first, tokens)",
    ),
    "w-before-it-is-there-for-keys": (
        PERFORMER,
        "__syncthreads();\n  p.loop([&](int64_t image, int first) {",
        "",
    ),
    "normalizer-of-gradients-forgotten": (
        PERFORMER,
        "kGradients ? p.of_normalizer[item] : normalizer",
        "kGradients ? 1.f : normalizer",
    ),
    "gradient-of-the-normalizer-forgotten": (
        PERFORMER,
        "pair.x * (to[0] + column[i % 4 * 2])",
        "pair.x * to[0]",
    ),
    "square-of-one-lane": (PERFORMER, "factor[i] = sum_of_row(factor[i]);", ""),
    "maximum-of-the-first-image": (
        PERFORMER,
        "p.maximum + image * kFeatures + sum_column(0)",
        "p.maximum + sum_column(0)",
    ),
    # Operands.
    "tile-left-out": (OPERANDS, "first < all", "first < all - (first > 8)"),
    "tile-of-the-first-image": (
        OPERANDS,
        "static_cast<uint32_t>(tile) / static_cast<uint32_t>(tiles)",
        "0",
    ),
    "pair-of-an-operand-swapped": (
        OPERANDS,
        "round_pair<T>(pair[0], pair[1])",
        "round_pair<T>(pair[1], pair[0])",
    ),
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


def results(ops, dtype):
    """Results of both operators for tokens that cover most paths of every kernel."""
    # Where neither eps nor a single feature decides alone, and beyond the limit.
    for sizes, rms, eps in (((3, 230), 0.3, 1e-3), ((2, 37), 1e20, 0.0)):
        if dtype == torch.float16 and rms > 1e4:
            continue
        (k, q, v), w = arguments((*sizes, *SIZES), rms, dtype, "cpu")
        k[0, 0] *= 50
        # Rows that are loaded as they are, and rows that are copied first.
        k, v = (tensor.mT.contiguous().mT if sizes[0] == 2 else tensor for tensor in (k, v))
        # A block of the queries' backward takes several parts of several tiles.
        with multiprocessors(1):
            y, *sums = ops.performer_attention(k, q, v, w, eps)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            grads = ops.performer_attention_backward(grad, k, q, v, w, *sums, eps)
        yield from (y, *sums, *grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_slip_changes_nothing(mutate, dtype):
    mutate(-1)
    assert not differs(results, dtype)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_found(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.bfloat16)
