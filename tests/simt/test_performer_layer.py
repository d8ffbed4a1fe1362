"""performer_layer's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.support.cuda.build import build_host_library
from tests.support.cuda.mutations import build_mutated, differs, multiprocessors
from tests.support.cuda.performer_layer import CASES, arguments, results
from tests.support.kernels.layouts import channels_last
from tests.support.kernels.performer_layer import assert_parity
from tests.support.names import name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned", "cuda_backend")]

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 3])
def blocks(request):
    """One block and its slot, or several blocks, with few tokens."""
    with multiprocessors(request.param):
        yield


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    tensors, split = arguments(case, dtype)
    # All that the gradients of a single key and query come from.
    eps = 0.1 if case == "one-token" else 0.0
    assert_parity(tensors, split, "cuda", channels_last, dropout_p=0.1, seed=3, eps=eps)


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    tensors, split = arguments("map", torch.bfloat16)
    assert_parity(tensors, split, "cuda", dropout_p=0.1, seed=3)


@pytest.mark.parametrize("case", ["several-tiles-of-a-warp", "image"])
def test_images_do_not_affect_each_other(case):
    """Tiles extend beyond the last token of an image, into the next one."""
    tensors, split = arguments(case, torch.bfloat16)
    numbers = (*split, 1e-3, 0.0)
    alone, *_ = torch.ops.t2t_cuda.performer_layer(*tensors, None, *numbers)
    tensors[0][1] = torch.nan
    beside, *_ = torch.ops.t2t_cuda.performer_layer(*tensors, None, *numbers)
    others = [i for i in range(len(tensors[0])) if i != 1]
    assert torch.equal(alone[others], beside[others])
    assert beside[1].isnan().all()


LAYER, PERFORMER, TAIL = "performer_layer.cu", "performer.cuh", "tail.cuh"
OPERANDS = "operands.cuh"
# Slips: a statement to drop, or an expression and its replacement.
SLIPS = {
    # Forward.
    "weights-before-they-are-there": (LAYER, "__syncthreads();\n  p.loop(", ""),
    "dropout-of-another-token": (TAIL, "first_token + lane_index() / 4", "first_token"),
    "dropout-of-the-upper-rows": (TAIL, "first + 8 * kBlocksOfToken", "first"),
    "dropout-of-the-first-columns": (TAIL, "first + kBlocksOfGroup", "first"),
    "dropout-by-the-lower-half-only": (TAIL, "word >> 16", "(word & 0xFFFF)"),
    "dropout-of-the-other-site": (
        TAIL,
        "Kept(dropout, kAfterMlp, first_token).apply(dropout, out)",
        "Kept(dropout, kAfterProj, first_token).apply(dropout, out)",
    ),
    "bias-of-the-projection-forgotten": (TAIL, "add_columns(a, vectors.proj_bias);", ""),
    "skip-forgotten": (TAIL, "add_operand<T>(a, v);", ""),
    "second-skip-forgotten": (
        TAIL,
        "out.at[i / 16][i / 8 % 2][i % 8] += a.at[i / 16][i / 8 % 2][i % 8];",
        "",
    ),
    "mean-of-one-lane": (
        TAIL,
        "sum_of_row(totals[0] + totals[1]) / kWidest",
        "(totals[0] + totals[1]) / 16",
    ),
    "variance-of-half-a-row": (TAIL, "squares[0] + squares[1]", "2 * squares[0]"),
    "gain-forgotten": (
        TAIL,
        "normalized.at[group][i / 8][i % 8] * gain[i % 8] + offset[i % 8]",
        "normalized.at[group][i / 8][i % 8] + offset[i % 8]",
    ),
    "tail-of-half-the-distribution": (TAIL, "x < 0.f ? beyond : 1.f - beyond", "1.f - beyond"),
    "row-of-a-matrix-not-dealt": (OPERANDS, "dealt(row)", "row"),
    "matrix-not-swizzled": (OPERANDS, "(group * 4 + i) ^ (at % 8)", "group * 4 + i"),
    "matrix-not-transposed": (OPERANDS, "j * 2 + lane / 16", "j * 2 + 1 - lane / 16"),
    "step-of-a-matrix-twice": (OPERANDS, "i / 2 * 4 + lane / 8", "lane / 8"),
    # The tail backward.
    "rows-of-the-block-above": (
        OPERANDS,
        "group * 2 + column / kGroup",
        "(group ^ 1) * 2 + column / kGroup",
    ),
    "dropout-forgotten-backward": (TAIL, "kept_proj.apply(dropout, grads);", ""),
    "dropout-forgotten-in-the-forward-of-the-backward": (
        TAIL,
        "kept_proj.apply(dropout, normalized);",
        "",
    ),
    "dropout-of-the-mlp-forgotten-backward": (
        TAIL,
        "Kept(dropout, kAfterMlp, first_token).apply(dropout, dropped);",
        "",
    ),
    "skip-forgotten-backward": (
        TAIL,
        "add_operand<T>(normalized, skip);",
        "",
    ),
    "gradient-of-the-skip-forgotten": (
        TAIL,
        "add_operand<T>(grads, load_operand<T>(p_.grad, image, first, tokens));",
        "",
    ),
    "slope-without-the-density": (TAIL, "fmaf(value, normal.y, normal.x)", "normal.x"),
    "hidden-units-not-activated": (TAIL, "value *= normal.x;", ""),
    "operands-before-they-are-there": (TAIL, "__syncthreads();\n    add_shared(mlp_out", ""),
    "operands-overwritten": (TAIL, "__syncthreads();\n\n    // mlp_in:", ""),
    "operands-before-they-are-there-2": (TAIL, "__syncthreads();\n    add_shared(mlp_in", ""),
    "operands-overwritten-2": (TAIL, "__syncthreads();\n\n    // The norm:", ""),
    "columns-before-they-are-there": (
        TAIL,
        "__syncthreads();\n    add_columns_of(lefts_, vector_sums_.at[kNormOffset])",
        "",
    ),
    "columns-overwritten": (
        TAIL,
        "__syncthreads();\n    keep_operand(grad, left);\n    keep_operand(y",
        "",
    ),
    "operands-before-they-are-there-3": (TAIL, "__syncthreads();\n    add_shared(proj", ""),
    "operands-overwritten-3": (TAIL, "__syncthreads();\n  }\n\n  // The sums over all tiles", ""),
    "half-of-the-tokens-missing": (
        TAIL,
        "halves[0][i % kWidest] + halves[1][i % kWidest]",
        "halves[0][i % kWidest]",
    ),
    "columns-of-another-warp": (
        TAIL,
        "half * (kBlockTokens / 2) + i",
        "i",
    ),
    "tokens-of-a-fragment-swapped": (
        OPERANDS,
        "token + lane % 8 + lane / 16 * 8",
        "token + lane % 8 + lane / 8 % 2 * 8",
    ),
    "mean-of-the-product-of-one-lane": (
        TAIL,
        "sum_of_row(mean_of_product[i]) / kWidest",
        "mean_of_product[i] / 16",
    ),
    "slot-left-out": (TAIL, "i + j < p.slot_count", "i + j < p.slot_count - (p.slot_count > 1)"),
    # The attention in the layer.
    "skip-of-the-values-forgotten": (PERFORMER, "if (p.skip.at) add_operand<T>", ""),
    "moments-not-stored": (
        "projection.cuh",
        "store_moments<T>(p, token, moments);\n    } else",
        "",
    ),
    "round-of-another-key": ("philox.cuh", "c[3] ^ k1", "c[3] ^ k0"),
}


@pytest.fixture(scope="module")
def mutate(cuda_on_host, host_cache, tmp_path_factory):
    choose, end = build_mutated(
        host_cache,
        tmp_path_factory.mktemp("mutated"),
        ["performer_layer.cu", "soft_split_linear.cu"],
        list(SLIPS.values()),
        ["performer_layer", "performer_layer_backward"],
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
