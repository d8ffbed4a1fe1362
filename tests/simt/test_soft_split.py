"""Soft split's CUDA source, run on the CPU: every path of the kernels, and mutations of each.

What holds for every backend is in ``tests/kernels``; here are the shapes and layouts that this
implementation treats differently.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F

import t2t_kernels  # noqa: F401  declares the operators
from tests.support.cuda.build import CUDA_SOURCES, build_host_library
from tests.support.cuda.layouts import (
    channels_of_a_wider_map,
    every_other_pixel,
    inside_nan,
    misaligned,
    nchw,
    nhwc,
    nhwc_misaligned,
)
from tests.support.cuda.mutations import build_mutated

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned")]

# B, C, H, W and kernel_size, stride, padding, each for a path of the kernels. The host's device has
# one multiprocessor, so that some dozens of tiles are already several per block.
CASES = {
    "tokens-off-vectors": ((2, 3, 13, 17), (7, 4, 2)),
    "several-tiles-in-a-row": ((1, 3, 9, 420), (7, 4, 2)),
    "channel-vectors": ((3, 16, 7, 11), (3, 2, 1)),
    "channel-vectors-in-tiles": ((2, 64, 9, 61), (3, 2, 1)),
    "a-block-takes-several-images": ((40, 3, 9, 11), (3, 2, 1)),
    "every-pixel-in-25-tokens": ((1, 8, 7, 7), (5, 1, 2)),
    "pixels-in-no-token": ((2, 8, 17, 11), (2, 5, 0)),
    "padding-only-tokens": ((1, 3, 4, 5), (2, 1, 3)),
    "token-larger-than-shared-memory": ((1, 300, 9, 8), (7, 4, 2)),
    "one-channel-larger-than-shared-memory": ((1, 2, 95, 93), (91, 2, 0)),
    "many-channels-of-a-pixel": ((2, 1000, 2, 3), (1, 1, 0)),
    "one-pixel": ((1, 1, 1, 1), (1, 1, 0)),
    "empty-batch": ((0, 3, 8, 8), (3, 2, 1)),
    "no-channels": ((2, 0, 8, 8), (3, 2, 1)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops(cuda_on_host):
    return torch.ops.t2t_cuda


@pytest.fixture(scope="module")
def host_library(host_cache):
    return ctypes.CDLL(build_host_library(host_cache))


LAYOUTS = [nchw, nhwc, nhwc_misaligned, channels_of_a_wider_map, every_other_pixel]


def contiguous(grad):
    return grad.contiguous()


def images_apart(grad):
    stride = (grad[:1].numel() + 5, grad.shape[2], 1)
    return inside_nan(grad, grad.shape, stride, 3)


def transposed(grad):
    return grad.transpose(1, 2).contiguous().transpose(1, 2)


GRADIENTS = [contiguous, misaligned, images_apart, transposed]


def whole_numbers(shape, dtype, generator):
    """Numbers so small that no sum is rounded in any dtype, so that results must be equal."""
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def check_forward(ops, case, dtype, layout):
    shape, split = CASES[case]
    x = layout(whole_numbers(shape, dtype, torch.Generator().manual_seed(1)))
    tokens = ops.soft_split(x, *split)
    expected = unfold(x.float(), *split).to(dtype)
    assert tokens.is_contiguous()
    assert_equal(tokens, expected)


def check_backward(ops, case, dtype, layout, channels_last):
    shape, split = CASES[case]
    height, width = shape[2:]
    like = unfold(torch.zeros(shape), *split)
    grad = layout(whole_numbers(like.shape, dtype, torch.Generator().manual_seed(2)))
    result = ops.soft_split_backward(grad, height, width, *split, channels_last)
    expected = fold(grad.float(), height, width, *split).to(dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=memory_format)
    assert_equal(result, expected)


def unfold(x, kernel_size, stride, padding):
    # One image and one channel more: PyTorch refuses to unfold nothing.
    batch, channels = x.shape[:2]
    padded = F.pad(x, (0, 0, 0, 0, 0, 1, 0, 1))
    tokens = F.unfold(padded, kernel_size, padding=padding, stride=stride).transpose(1, 2)
    return tokens[:batch, :, : channels * kernel_size**2]


def fold(grad, height, width, kernel_size, stride, padding):
    batch, _, token_width = grad.shape
    columns = F.pad(grad, (0, kernel_size**2, 0, 0, 0, 1)).transpose(1, 2)
    image = F.fold(columns, (height, width), kernel_size, padding=padding, stride=stride)
    return image[:batch, : token_width // kernel_size**2]


def assert_equal(ours, expected):
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    wrong = ours != expected
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} differ, first {wrong.nonzero()[0]}"


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value.__name__


def far_apart(size, dimension):
    """Integers that span 2³¹ elements along one dimension, in mostly untouched memory."""
    stride = [2 ** (3 * i) for i in reversed(range(len(size)))]
    stride[dimension] = 2**31 // (size[dimension] - 1) + 1
    extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(extent, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are not to be had: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    values = torch.arange(1, 1 + torch.Size(size).numel(), dtype=memory.dtype)
    return memory.as_strided(size, stride).copy_(values.view(size))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_forward(ops, case, layout):
    check_forward(ops, case, torch.bfloat16, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_forward_dtype(ops, case, dtype):
    check_forward(ops, case, dtype, nchw)
    check_forward(ops, case, dtype, nhwc)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layout", GRADIENTS, ids=name)
@pytest.mark.parametrize("case", CASES)
def test_backward(ops, case, layout, channels_last):
    check_backward(ops, case, torch.bfloat16, layout, channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize("case", CASES)
def test_backward_dtype(ops, case, dtype):
    check_backward(ops, case, dtype, contiguous, False)
    check_backward(ops, case, dtype, contiguous, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_backward_rounds_once(ops, dtype):
    """Sums of 49 tokens in float32, rounded at the end."""
    grad = torch.randn(1, 81, 8 * 49).to(dtype)
    ours = ops.soft_split_backward(grad, 9, 9, 7, 1, 3, True)
    exact = fold(grad.double(), 9, 9, 7, 1, 3)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 49 * 2**-23 * fold(
        grad.double().abs(), 9, 9, 7, 1, 3
    )
    assert ((ours.double() - exact).abs() <= bound).all()


def test_expanded(ops):
    """Zero strides: one image as a batch, one number as a gradient."""
    x = whole_numbers((1, 3, 9, 8), torch.float32, None).expand(4, -1, -1, -1)
    assert_equal(ops.soft_split(x, 3, 2, 1), unfold(x, 3, 2, 1))
    grad = torch.tensor(2.0).expand(4, 20, 27)
    ours = ops.soft_split_backward(grad, 9, 8, 3, 2, 1, True)
    assert_equal(ours, fold(grad, 9, 8, 3, 2, 1))


@pytest.mark.parametrize("dimension", range(4))
def test_input_offsets_beyond_32_bits(ops, dimension):
    x = far_apart((2, 2, 2, 2), dimension)
    assert_equal(ops.soft_split(x, 2, 1, 1), unfold(x.contiguous(), 2, 1, 1))


@pytest.mark.parametrize("dimension", range(3))
def test_gradient_offsets_beyond_32_bits(ops, dimension):
    """Distant images still use shared memory; distant tokens and elements are read in place."""
    grad = far_apart((2, 2, 4), dimension)
    ours = ops.soft_split_backward(grad, 2, 3, 2, 1, 0, False)
    assert_equal(ours, fold(grad.contiguous(), 2, 3, 2, 1, 0))


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads(ops, host_library, seed):
    host_library.simt_seed(ctypes.c_uint64(seed))
    for case in ("a-block-takes-several-images", "channel-vectors-in-tiles"):
        check_forward(ops, case, torch.float32, nhwc)
        check_backward(ops, case, torch.float32, contiguous, True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ops: ops.soft_split(torch.zeros(3, 8, 8), 3, 2, 1),
            r"got shape \(3, 8, 8\), expected 4 dimensions",
        ),
        (
            lambda ops: ops.soft_split(torch.zeros(1, 3, 2, 8), 5, 2, 1),
            "got a map of 2x8, expected at least 3",
        ),
        (lambda ops: ops.soft_split(torch.zeros(1, 3, 8, 8), 0, 2, 1), "kernel_size 0"),
        (lambda ops: ops.soft_split(torch.zeros(1, 3, 8, 8), 3, 0, 1), "stride 0"),
        (lambda ops: ops.soft_split(torch.zeros(1, 3, 8, 8), 3, 2, -1), "padding -1"),
        (lambda ops: ops.soft_split(torch.zeros(1, 3, 8, 8).double(), 3, 2, 1), "got float64"),
        (
            lambda ops: ops.soft_split(torch.zeros(1, 1, 8, 8), 8, 1, 2**30),
            "padding: got 1073741824, expected at most 1073741819",
        ),
        (
            lambda ops: ops.soft_split_backward(torch.zeros(1, 9, 27), 8, 8, 3, 2, 1, True),
            r"got shape \(1, 9, 27\), expected \(1, 16, 27\)",
        ),
        (
            lambda ops: ops.soft_split_backward(torch.zeros(1, 16, 28), 8, 8, 3, 2, 1, True),
            r"got shape \(1, 16, 28\), expected \(1, 16, 27\)",
        ),
        (
            lambda ops: ops.soft_split_backward(torch.zeros(16, 27), 8, 8, 3, 2, 1, True),
            r"got shape \(16, 27\), expected 3 dimensions",
        ),
    ],
)
def test_bad_input(ops, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops)


# Slips: an expression and its replacement.
SLIPS = {
    "last-element-not-copied": ("vec.cuh", "min(end, length)", "min(end, length) - 1"),
    "first-element-not-copied": ("vec.cuh", "max(begin, 0)", "max(begin, 1)"),
    "tokens-one-element-off": ("soft_split.cu", "phase_of(span)", "phase_of(span) ^ 1"),
    "one-token-too-few": ("soft_split.cu", "t < tokens", "t < tokens - 1"),
    "no-zeros-right-of-a-line": (
        "soft_split.cu",
        "min(left + patch_width, map.width)",
        "min(left + patch_width, map.width + 1)",
    ),
    "no-zeros-right-of-a-pixel": (
        "soft_split.cu",
        "row >= 0 && row < map.height && column >= 0 && column < map.width",
        "row >= 0 && row < map.height && column >= 0 && column <= map.width",
    ),
    "gap-between-rows-forgotten": ("soft_split.cu", "(between_rows - span) % V", "0"),
    "pixel-misses-a-row-of-tokens": ("soft_split.cu", "row < rows", "row < rows - 1"),
    "pixel-takes-a-token-too-many": (
        "soft_split.cu",
        "(at - map.kernel) / map.stride + 1",
        "(at - map.kernel) / map.stride",
    ),
}
BARRIERS = 4
MUTATIONS = [f"barrier-{i}-dropped" for i in range(BARRIERS)] + list(SLIPS)


@pytest.fixture(scope="module")
def mutate(host_cache, tmp_path_factory):
    """Chooses a mutation in a copy of the kernels by its index in MUTATIONS; -1 for none."""
    text = (CUDA_SOURCES / "soft_split.cu").read_text()
    barrier = "__syncthreads();"
    parts = text.split(barrier)
    assert len(parts) == 1 + BARRIERS, "MUTATIONS is to name every barrier"
    # Each with as much of what follows as tells it from the others.
    following = [barrier + part[:120] for part in parts[1:]]
    barriers = [("soft_split.cu", statement, "") for statement in following]
    choose, end = build_mutated(
        host_cache,
        tmp_path_factory.mktemp("mutated"),
        ["soft_split.cu"],
        [*barriers, *SLIPS.values()],
        ["soft_split", "soft_split_backward"],
    )
    yield choose
    end()


def check_mutated():
    for case in list(CASES)[:5]:
        for layout in (nchw, nhwc):
            check_forward(torch.ops.t2t_mutated, case, torch.bfloat16, layout)
        for channels_last in (False, True):
            check_backward(torch.ops.t2t_mutated, case, torch.bfloat16, misaligned, channels_last)


def test_no_mutation_passes(mutate):
    mutate(-1)
    check_mutated()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_found(mutate, mutation):
    mutate(MUTATIONS.index(mutation))
    with pytest.raises((AssertionError, RuntimeError)):
        check_mutated()
