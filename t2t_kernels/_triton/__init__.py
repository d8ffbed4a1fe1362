"""What the Triton kernels share: where they run, how they are launched, the matrix product.

Device functions by subject: ``split`` (patches of a map), ``performer`` (random features and their
attention), ``attention`` (softmax attention), ``tail`` (projection, skip, MLP, dropout).
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

# The interpreter runs kernels on CPU tensors, for the tests.
from t2t_kernels.backends import DEVICE_TYPES, INTERPRETED

# Before 3.8, Triton puts no proxy fence between an asynchronous copy to shared memory and the wgmma
# that reads it, so a softmax loop on 9.0 must load its tiles without one: with a single stage.
_ASYNCHRONOUS_COPIES = TorchVersion(triton.__version__) >= (3, 8)

IMPL_DEVICES = tuple(sorted(DEVICE_TYPES["triton"]))

_INTERPRETED = tl.constexpr(INTERPRETED)

# tl.dot takes no side below it.
SMALLEST_SIDE = 16


class Launch(NamedTuple):
    """How a kernel is launched: the tokens of a tile, warps, and the pipeline's depth."""

    block_t: int
    warps: int
    stages: int
    # Tokens of a tile that the program walks over, where it attends to tokens.
    block_s: int = 0


class Table(NamedTuple):
    """Launch parameters of one architecture; a kernel's pair is for 2-byte types and for float32."""

    # Programs of a backward kernel, each with a slot for its partial sums: about one per
    # multiprocessor. The order of the sums, so the last bits of a gradient, depend on it.
    slots: int
    forward: tuple[Launch, Launch]
    backward: tuple[Launch, Launch]
    attention: tuple[Launch, Launch]
    softmax: tuple[Launch, Launch]
    softmax_backward: tuple[Launch, Launch]


# By compute capability; `python -m bench.tune` measures the alternatives on the device it runs on.
TABLES = {
    version: Table(
        slots=slots,
        forward=(Launch(32, 4, 2), Launch(32, 8, 2)),
        backward=(Launch(*backward, 1), Launch(16, 8, 1)),
        attention=(Launch(16, 4, 2), Launch(16, 4, 2)),
        softmax=(Launch(128, 8, stages, 64), Launch(block_s, 4, 2, 32)),
        softmax_backward=(Launch(64, 4, min(2, stages), block_s), Launch(32, 4, 2, 32)),
    )
    for version, slots, backward, block_s, stages in (
        (80, 108, (16, 4), 32, 3),
        (90, 132, (32, 8), 64, 3 if _ASYNCHRONOUS_COPIES else 1),
        (120, 170, (32, 8), 32, 3),
    )
}
# Few and large tiles, since an operation costs the interpreter the same whatever its size; few
# slots, so that small problems exercise their reuse.
_INTERPRETER = Table(3, *[(Launch(64, 4, 1),) * 2] * 3, *[(Launch(128, 4, 1, 512),) * 2] * 2)


def table(device: torch.device) -> Table:
    """The launch parameters for ``device``: those of the newest architecture not newer than it."""
    if device.type == "cuda":
        return _table_of(torch.cuda.get_device_capability(device))
    return _INTERPRETER


@functools.cache
def _table_of(capability: tuple[int, int]) -> Table:
    version = capability[0] * 10 + capability[1]
    return TABLES[max(known for known in TABLES if known <= version)]


def launch(pair: tuple[Launch, Launch], dtype: torch.dtype, *sizes: int) -> Launch:
    """The pair's entry for ``dtype``; a size (E, m, M) above 64 makes shorter tiles of more threads."""
    entry = pair[dtype == torch.float32]
    width = padded(max(sizes))
    if width <= 64:
        return entry
    return Launch(max(SMALLEST_SIDE, entry.block_t * 64 // width), warps=8, stages=1)


def padded(size: int) -> int:
    """The side of the tile that holds ``size`` rows or columns."""
    return max(SMALLEST_SIDE, triton.next_power_of_2(size))


def random_features(w: Tensor) -> Tensor:
    """Random features as the kernels read them: contiguous, and 4 bytes each at most."""
    return (w.float() if w.dtype == torch.float64 else w).contiguous()


def device_guard(tensor: Tensor):
    """Launch on the device that holds ``tensor``, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_offsets(name: str, *tensors: Tensor) -> None:
    """Offsets inside an image are 32 bits wide; those of images are not."""
    for tensor in tensors:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:]))
        if reach >= 2**31:
            raise ValueError(
                f"{name} on the triton backend: a tensor of shape {tuple(tensor.shape)} spans more than "
                "2^31 elements per image"
            )


@triton.jit
def load_vector(p, SIZE: tl.constexpr, SIZE_P: tl.constexpr):
    o = tl.arange(0, SIZE_P)
    return tl.load(p + o, mask=o < SIZE, other=0.0).to(tl.float32)


@triton.jit
def rounded(b, DTYPE: tl.constexpr):
    """A float32 tile in DTYPE, rounded to nearest."""
    # The interpreter cuts bfloat16 off instead: round the bits before it does.
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = b.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        b = tl.where(b == b, bits.to(tl.float32, bitcast=True), b)
    return b.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """a·b + acc, accumulated in float32; float32 operands lose nothing, each split into three."""
    tl.static_assert(a.dtype == b.dtype, "the factors of a product have different dtypes")
    # The interpreter's products of bfloat16 are silently wrong.
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")
