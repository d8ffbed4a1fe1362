"""performer_layer's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.kernels import test_performer_layer
from tests.kernels.test_performer_layer import assert_parity
from tests.kernels.test_reference import performer_params
from tests.simt.build import build_host_library
from tests.simt.mutations import build_mutated, differs
from tests.simt.test_soft_split import name

pytestmark = pytest.mark.usefixtures("poisoned", "cuda_backend")

# Map, kernel_size, stride, padding, and E, m, M, each for a path of the kernels.
CASES = {
    "widest": ((1, 16, 9, 8), (3, 2, 1), (64, 64, 64)),
    "several-tiles-of-a-warp": ((3, 3, 10, 11), (3, 1, 1), (24, 40, 8)),
    "token-larger-than-shared-memory": ((1, 64, 6, 6), (5, 2, 2), (16, 8, 24)),
    "one-of-each": ((2, 3, 5, 4), (3, 2, 1), (1, 1, 1)),
}


def arguments(case, dtype):
    shape, split, sizes = CASES[case]
    torch.manual_seed(len(case))
    params = performer_params(shape[1] * split[0] ** 2, *sizes, dtype=torch.float32)
    params.w.mul_((sizes[1] / sizes[0]) ** 0.5)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [tensor.to(dtype) for tensor in (x, *params)], split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    tensors, split = arguments(case, dtype)
    layout = test_performer_layer.channels_last
    assert_parity(tensors, split, "cuda", layout, dropout_p=0.1, seed=3, eps=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    tensors, split = arguments("widest", torch.bfloat16)
    assert_parity(tensors, split, "cuda", dropout_p=0.1, seed=3)


def test_an_image_does_not_touch_another():
    """Tiles reach beyond the last token of an image, into the next one."""
    tensors, split = arguments("several-tiles-of-a-warp", torch.bfloat16)
    numbers = (*split, 1e-3, 0.0)
    alone, *_ = torch.ops.t2t_cuda.performer_layer(*tensors, None, *numbers)
    tensors[0][1] = torch.nan
    beside, *_ = torch.ops.t2t_cuda.performer_layer(*tensors, None, *numbers)
    assert torch.equal(alone[[0, 2]], beside[[0, 2]])


LAYER, COMMON, TAIL = "performer_layer.cu", "layer.cuh", "tail.cuh"
# A statement that a slip drops, or an expression and what a slip would make of it.
SLIPS = {
    "tile-overwritten": (COMMON, "__syncwarp();\n}\n\n// Everything", ""),
    "keys-before-they-are-there": (LAYER, "__syncwarp();\n    running.add", ""),
    "features-overwritten": (TAIL, "__syncwarp();\n  keep_rounded(y, operand);", ""),
    "y-before-it-is-there": (TAIL, "__syncwarp();\n  Wide a = times", ""),
    "hidden-overwrites-the-norm": (TAIL, "__syncwarp();\n  keep_rounded(hidden", ""),
    "dropout-of-another-token": (
        TAIL,
        "token * t.embed + sum_column(i / 2)",
        "token * t.embed",
    ),
    "skip-forgotten": (TAIL, "add_v(a);", ""),
    "skip-forgotten-backward": (TAIL, "add(a, v);", ""),
    "y-before-it-is-there-backward": (TAIL, "__syncwarp();\n      Wide a = times", ""),
    "features-overwritten-backward": (
        LAYER,
        "__syncwarp();\n    keep_rounded(attended.y, kept_y);",
        "",
    ),
    "hidden-before-the-norm": (TAIL, "__syncwarp();\n      hidden = times", ""),
    "operands-before-they-are-there": (
        TAIL,
        "__syncthreads();\n    add_product(TailSlot::kMlpOut",
        "",
    ),
    "operands-overwritten": (TAIL, "__syncthreads();\n\n    // mlp_in:", ""),
    "operands-before-they-are-there-2": (
        TAIL,
        "__syncthreads();\n    add_product(TailSlot::kMlpIn",
        "",
    ),
    "operands-overwritten-2": (TAIL, "__syncthreads();\n\n    // The norm:", ""),
    "columns-before-they-are-there": (TAIL, "__syncthreads();\n    add_columns(upper ?", ""),
    "columns-overwritten": (
        TAIL,
        "__syncthreads();\n    scale_and_shift<T>(grad, t.norm_gain",
        "",
    ),
    "operands-before-they-are-there-3": (
        TAIL,
        "__syncthreads();\n    add_product(TailSlot::kProj",
        "",
    ),
    "operands-overwritten-3": (TAIL, "__syncthreads();\n  }\n}\n\nstruct TailFinishParams", ""),
    "slot-not-added-to": (TAIL, "first ? sum : at[i * TailSlot::kThreads] + sum", "sum"),
    "columns-not-added-to": (TAIL, "first ? total : at + total", "total"),
    "slot-left-out": (TAIL, "i < p.slot_count", "i < p.slot_count - (i > 0)"),
    "sums-before-they-are-there": (LAYER, "__syncthreads();\n    sums.add", ""),
    "sums-overwritten": (LAYER, "__syncthreads();\n  }\n  sums.store", ""),
    "skip-of-the-values-forgotten": (LAYER, "add_rows<T>({static_cast", ""),
    "one-round-less": ("philox.cuh", "round < 10", "round < 9"),
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


def results(ops, dtype):
    """Of both operators, on a map that takes every kernel through most of its paths."""
    tensors, split = arguments("several-tiles-of-a-warp", dtype)
    seed, numbers = torch.tensor([5]), (*split, 1e-3, 0.25)
    y, *sums = ops.performer_layer(*tensors, seed, *numbers)
    yield from (y, *sums)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    yield from ops.performer_layer_backward(grad, *tensors, seed, *sums, *numbers, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_no_slip_changes_nothing(mutate, dtype):
    mutate(-1)
    assert not differs(results, dtype)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_noticed(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.float32) or differs(results, torch.bfloat16)
