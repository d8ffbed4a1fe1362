"""transformer_layer's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.kernels.test_reference import transformer_params
from tests.kernels.test_soft_split import channels_last
from tests.kernels.test_transformer_layer import assert_parity
from tests.simt.build import build_host_library
from tests.simt.mutations import build_mutated, differs
from tests.simt.test_soft_split import name

pytestmark = pytest.mark.usefixtures("poisoned", "cuda_backend")

# Map, kernel_size, stride, padding, and E, M, each for a path of the kernels.
CASES = {
    "several-blocks-of-an-image": ((1, 16, 13, 12), (2, 1, 1), (64, 64)),
    "several-blocks-of-tails": ((3, 3, 10, 11), (3, 1, 1), (24, 8)),
    "token-larger-than-shared-memory": ((1, 64, 6, 6), (5, 2, 2), (16, 24)),
    "rows-off-vectors": ((2, 3, 7, 6), (3, 1, 1), (13, 33)),
    # Rows of half types begin anywhere, those of float32 at vectors.
    "half-a-vector": ((2, 3, 7, 9), (3, 2, 1), (20, 36)),
    "one-of-each": ((2, 3, 5, 4), (3, 2, 1), (1, 1)),
}


def arguments(case, dtype):
    shape, split, sizes = CASES[case]
    torch.manual_seed(len(case))
    params = transformer_params(shape[1] * split[0] ** 2, *sizes, dtype=torch.float32)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [tensor.to(dtype) for tensor in (x, *params)], split


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    tensors, split = arguments(case, dtype)
    assert_parity(tensors, split, "cuda", channels_last)


def test_gradient_that_is_not_contiguous():
    tensors, split = arguments("half-a-vector", torch.bfloat16)
    y, *saved = torch.ops.t2t_cuda.transformer_layer(*tensors, *split, 0.2)

    def backward(grad):
        ops = torch.ops.t2t_cuda
        return ops.transformer_layer_backward(grad, *tensors, *saved, *split, 0.2, True)

    transposed = torch.randn(y.mT.shape).to(y.dtype).mT
    for grad in (transposed, y[:1, :1, :1].expand(y.shape)):
        assert all(map(torch.equal, backward(grad), backward(grad.contiguous())))


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(host_cache, seed):
    ctypes.CDLL(build_host_library(host_cache)).simt_seed(ctypes.c_uint64(seed))
    tensors, split = arguments("several-blocks-of-tails", torch.bfloat16)
    assert_parity(tensors, split, "cuda")


def test_an_image_does_not_touch_another():
    """Tiles reach beyond the last token of an image, into the next one."""
    tensors, split = arguments("several-blocks-of-tails", torch.bfloat16)
    alone, *saved = torch.ops.t2t_cuda.transformer_layer(*tensors, *split, 0.2)
    grad = torch.ones_like(alone)
    grad_alone, *_ = torch.ops.t2t_cuda.transformer_layer_backward(
        grad, *tensors, *saved, *split, 0.2, True
    )
    tensors[0][1] = torch.nan
    beside, *saved = torch.ops.t2t_cuda.transformer_layer(*tensors, *split, 0.2)
    grad_beside, *_ = torch.ops.t2t_cuda.transformer_layer_backward(
        grad, *tensors, *saved, *split, 0.2, True
    )
    assert torch.equal(alone[[0, 2]], beside[[0, 2]])
    assert torch.equal(grad_alone[[0, 2]], grad_beside[[0, 2]])


@pytest.mark.parametrize("sizes", [(65, 8), (8, 65)])
def test_wider_than_the_kernel_takes(sizes):
    """The operator's own check; the public function chooses another backend before."""
    params = transformer_params(27, *sizes, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="E and M from 1 to 64"):
        torch.ops.t2t_cuda.transformer_layer(torch.zeros(1, 3, 4, 4), *params, 3, 2, 1, 1.0)


LAYER, SOFTMAX, TAIL = "transformer_layer.cu", "softmax.cuh", "tail.cuh"
ROWS = "rows.cuh"
# A statement that a slip drops, or an expression and what a slip would make of it. More of them, in
# what the layer shares, are in the tests of performer_layer and token_attention.
SLIPS = {
    "tile-of-another-image": (LAYER, "tile - image * projection.tiles", "tile"),
    "rows-taken-for-vectors": (ROWS, "embed % Vec<T>::size == 0", "embed % 4 == 0"),
    "rows-of-another-image": (LAYER, "image * projection.tokens + first", "first"),
    "last-row-not-stored": (LAYER, "projection.tokens - first", "projection.tokens - first - 1"),
    "y-overwritten": (TAIL, "__syncwarp();\n  keep_rounded(y, operand);", ""),
    "skip-forgotten": (LAYER, "add_rows<T>(p.in.values", ""),
    "last-result-not-stored": (
        LAYER,
        "block.tokens - block.first",
        "block.tokens - block.first - 1",
    ),
    "values-of-another-image": (LAYER, "image * tokens + first", "first"),
    "values-not-rounded": (LAYER, "value = static_cast<float>(static_cast<T>(value));", ""),
    "skip-overwritten": (SOFTMAX, "p.on_top", "false"),
    "gradient-of-another-row": (SOFTMAX, "to + row * stride + column", "to + column"),
}


@pytest.fixture(scope="module")
def mutate(cuda_on_host, host_cache, tmp_path_factory):
    choose, end = build_mutated(
        host_cache,
        tmp_path_factory.mktemp("mutated"),
        ["transformer_layer.cu", "soft_split_linear.cu"],
        list(SLIPS.values()),
        ["transformer_layer", "transformer_layer_backward"],
    )
    yield choose
    end()


def results(ops, dtype):
    """Of both operators, on maps that take every kernel through most of its paths."""
    for case in ("several-blocks-of-tails", "half-a-vector"):
        tensors, split = arguments(case, dtype)
        y, *saved = ops.transformer_layer(*tensors, *split, 0.3)
        yield from (y, *saved)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        yield from ops.transformer_layer_backward(grad, *tensors, *saved, *split, 0.3, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_no_slip_changes_nothing(mutate, dtype):
    mutate(-1)
    assert not differs(results, dtype)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_noticed(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.float32) or differs(results, torch.bfloat16)
