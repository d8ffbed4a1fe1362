"""transformer_layer's CUDA source, run on the CPU: its own paths, and slips of each kernel."""

import ctypes

import pytest
import torch

from tests.support.cuda.build import build_host_library
from tests.support.cuda.mutations import build_mutated, differs, multiprocessors
from tests.support.cuda.transformer_layer import CASES, SIZES, arguments, results
from tests.support.kernels.layouts import channels_last
from tests.support.kernels.params import transformer_params
from tests.support.kernels.transformer_layer import assert_parity
from tests.support.names import name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned", "cuda_backend")]

DTYPES = [torch.bfloat16, torch.float16]
HALF, FLOAT = torch.bfloat16, torch.float32


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
    assert_parity(tensors, split, "cuda", channels_last)


def test_gradient_that_is_not_contiguous():
    tensors, split = arguments("image", torch.bfloat16)
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


def test_images_do_not_affect_each_other():
    """Tiles extend beyond the last token of an image, into the next one."""
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


@pytest.mark.parametrize(("sizes", "dtype"), [((65, 64), HALF), ((64, 8), HALF), (SIZES, FLOAT)])
def test_unsupported_arguments(sizes, dtype):
    """The check of the operator; the public function would choose another backend."""
    params = transformer_params(27, *sizes, dtype=dtype)
    with pytest.raises(RuntimeError, match="got .*, expected"):
        torch.ops.t2t_cuda.transformer_layer(
            torch.zeros(1, 3, 4, 4, dtype=dtype), *params, 3, 2, 1, 1.0
        )


LAYER, SOFTMAX, TAIL = "transformer_layer.cu", "softmax.cuh", "tail.cuh"
# Slips: a statement to drop, or an expression and its replacement. Slips in shared code are in the tests
# of performer_layer and token_attention.
SLIPS = {
    "weights-of-another-map": (
        "tail.cuh",
        "load_weight<T>(weights + kMatrixVectors, tail.mlp_in);",
        "",
    ),
    "attended-not-stored": (LAYER, "rows.store(p.attended, kWidest, block);", ""),
    "values-of-another-image": (
        LAYER,
        "load_operand<T>(p.in.values, block.image, block.first, block.tokens)",
        "load_operand<T>(p.in.values, 0, block.first, block.tokens)",
    ),
    "rows-of-another-image": (LAYER, "block.row(block.first)", "block.first"),
    "weights-before-they-are-there-backward": (LAYER, "__syncthreads();", ""),
    "y-of-another-image": (LAYER, "image * tokens + token", "token"),
    "y-beyond-the-last-token": (LAYER, "token < tokens", "token + 1 < tokens"),
    "sections-in-one": ("projection.cuh", "p.y[of_block / kWidest]", "p.y[0]"),
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


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_slip_changes_nothing(mutate, dtype):
    mutate(-1)
    assert not differs(results, dtype)


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_found(mutate, slip):
    mutate(list(SLIPS).index(slip))
    assert differs(results, torch.bfloat16)
