"""What the Triton kernels share: where they run, how they are launched, the matrix product.

``matrix``: products with a matrix in memory. ``tail``: what follows the attention of a layer. The kernels
of an operation are in its own folder, and the layers launch those of the operations they consist of.

What is constant over a network (sizes, strides, the geometry of a soft split) is compiled in: kernels
take it as one hashable ``tl.constexpr`` argument.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

# The interpreter runs kernels on CPU tensors, for the tests.
from t2t_kernels.backends import BACKENDS, INTERPRETED

# Before 3.8, Triton puts no proxy fence between an asynchronous copy to shared memory and the wgmma
# that reads it, so a loop of products on 9.0 must load its tiles without one: with a single stage.
_ASYNCHRONOUS_COPIES = TorchVersion(triton.__version__) >= (3, 8)

IMPL_DEVICES = BACKENDS["triton"].device_types

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

    # Programs of a kernel that sums gradients of weights, each with a slot for its sums: about one per
    # multiprocessor. The order of the sums, so the last bits of a gradient, depend on it.
    slots: int
    project: tuple[Launch, Launch]
    weight_gradient: tuple[Launch, Launch]
    map_gradient: tuple[Launch, Launch]
    attention: tuple[Launch, Launch]
    tail_backward: tuple[Launch, Launch]
    softmax: tuple[Launch, Launch]
    softmax_backward: tuple[Launch, Launch]


# By compute capability; `python -m bench.tune` measures the alternatives on the device it runs on.
TABLES = {
    version: Table(
        slots=slots,
        # Eight warps multiply twice what they share on 8.0 and 12.0, but with four some spill.
        project=(Launch(64, 8, min(2, stages)), Launch(32, 4, 1)),
        weight_gradient=(Launch(64, 4, 1), Launch(32, 4, 1)),
        map_gradient=(Launch(64, warps, min(2, stages)), Launch(32, 8, min(2, stages))),
        attention=(Launch(64, 4, 1), Launch(16, 4, 1)),
        tail_backward=(Launch(64, 4, 1), Launch(16, 4, 1)),
        softmax=(Launch(128, 8, stages, 64), Launch(block_s, 4, 2, 32)),
        softmax_backward=(Launch(64, 4, min(2, stages), block_s), Launch(32, 4, 2, 32)),
    )
    for version, slots, block_s, stages, warps in (
        (80, 108, 32, 3, 4),
        (90, 132, 64, 3 if _ASYNCHRONOUS_COPIES else 1, 8),
        (120, 170, 32, 3, 8),
    )
}
# Few and large tiles, since an operation costs the interpreter the same whatever its size; few
# slots, so that small problems exercise their reuse.
_INTERPRETER = Table(3, *[(Launch(64, 4, 1),) * 2] * 5, *[(Launch(128, 4, 1, 512),) * 2] * 2)


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


@dataclass(frozen=True)
class Strides:
    """Of a (batch, tokens, embed) tensor."""

    b: int
    t: int
    e: int


@dataclass(frozen=True)
class Sizes:
    """E, m and M of an attention or a layer, their padded sides, and where the tail's parameters begin."""

    embed: int
    features: int = 0
    hidden: int = 0

    @property
    def embed_p(self) -> int:
        return padded(self.embed)

    @property
    def features_p(self) -> int:
        return padded(self.features)

    @property
    def hidden_p(self) -> int:
        return padded(self.hidden)

    @property
    def contiguous(self) -> Strides:
        """Of the rows of a contiguous matrix."""
        return Strides(0, self.embed, 1)

    # In the order of the layers' parameters: proj, norm, fc1, fc2, each a weight and a bias.
    @property
    def proj_bias(self) -> int:
        return self.embed**2

    @property
    def norm(self) -> int:
        return self.proj_bias + self.embed

    @property
    def fc1(self) -> int:
        return self.norm + 2 * self.embed

    @property
    def fc1_bias(self) -> int:
        return self.fc1 + self.hidden * self.embed

    @property
    def fc2(self) -> int:
        return self.fc1_bias + self.hidden

    @property
    def fc2_bias(self) -> int:
        return self.fc2 + self.embed * self.hidden

    @property
    def tail(self) -> int:
        """Numbers of the tail's parameters."""
        return self.fc2_bias + self.embed


def strides(tensor: Tensor) -> Strides:
    return Strides(*tensor.stride())


def device_guard(tensor: Tensor):
    """Launch on the device that holds ``tensor``, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_offsets(name: str, *tensors: Tensor) -> None:
    """Offsets inside an image are 32 bits wide; those of images are not."""
    for tensor in tensors:
        reach = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:])
        )
        if reach >= 2**31:
            raise ValueError(
                f"{name} on the triton backend: a tensor of shape {tuple(tensor.shape)} spans more than "
                "2^31 elements per image"
            )


# Elements of a slot and slots that a program of sum_slots_kernel adds at a time.
_SUM_ELEMENTS, _SUM_SLOTS = (4096, 4) if INTERPRETED else (128, 16)


@triton.jit
def sum_slots_kernel(
    p_slots,  # (slots, size) float32
    p_sums,  # (size,)
    slots,
    size,
    ELEMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    o = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    b = tl.zeros([SLOTS, ELEMENTS], tl.float32)
    for first in range(0, slots, SLOTS):
        o_slot = first + tl.arange(0, SLOTS)
        p = p_slots + o_slot.to(tl.int64)[:, None] * size + o[None, :]
        b += tl.load(p, mask=(o_slot < slots)[:, None] & (o < size)[None, :], other=0.0)
    tl.store(p_sums + o, rounded(tl.sum(b, 0), p_sums.dtype.element_ty), mask=o < size)


def sum_slots(slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows of (slots, size), always in the same order."""
    size = slots.shape[1]
    sums = slots.new_empty(size, dtype=dtype)
    with device_guard(slots):
        sum_slots_kernel[(triton.cdiv(size, _SUM_ELEMENTS),)](
            slots, sums, *slots.shape, ELEMENTS=_SUM_ELEMENTS, SLOTS=_SUM_SLOTS, num_warps=4
        )
    return sums


def slot_count(slots: int, items: int, floats: int) -> int:
    """Programs that share ``items``, each with ``floats`` sums of its own: 128 MiB in all."""
    return max(1, min(slots, items, 2**25 // floats))


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


@triton.jit
def load_rows(p, i_image, o_t, m_t, S: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr = True):
    """Rows ``o_t`` of an image's (T, E) matrix in its own dtype, zero beyond it."""
    o_e = tl.arange(0, D.embed_p)
    p = p + i_image * S.b + o_t[:, None] * S.t + o_e[None, :] * S.e
    # Masks that are always true still take registers.
    if MASKED or D.embed != D.embed_p:
        return tl.load(p, mask=m_t[:, None] & (o_e < D.embed)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def store_rows(p, b, i_image, o_t, m_t, S: tl.constexpr, D: tl.constexpr):
    """Store ``b`` as rows ``o_t`` of an image's (T, E) matrix."""
    o_e = tl.arange(0, D.embed_p)
    p = p + i_image * S.b + o_t[:, None] * S.t + o_e[None, :] * S.e
    tl.store(p, rounded(b, p.dtype.element_ty), mask=m_t[:, None] & (o_e < D.embed)[None, :])
