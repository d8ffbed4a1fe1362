"""The measured rows: operation × size × batch × dtype × pass × backend.

The rows of a kernel follow from the table of operations. Rivals come from :mod:`bench.rivals`.
"""

import itertools
from dataclasses import dataclass

import torch

from bench.rivals import RIVALS, softmax
from t2t_kernels.backends import OPERATIONS, why_unavailable
from t2tvit.models.t2t_module import SoftSplit

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
# Width of a layer, its random features, and width of the last projection (T2T-ViT-14).
EMBED, FEATURES, CLASS_WIDTH = 64, 32, 384
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "backward", "full")
# Whole tokens-to-token modules, with the operation of their layers.
MODULES = {"performer_module": "performer_layer", "transformer_module": "transformer_layer"}
IMAGE = "224"


@dataclass(frozen=True)
class Layer:
    """A soft split of T2T-ViT at 224×224 pixels."""

    channels: int
    size: int
    kernel_size: int
    stride: int
    padding: int

    @property
    def split(self) -> SoftSplit:
        return SoftSplit(kernel_size=self.kernel_size, stride=self.stride, padding=self.padding)

    @property
    def width(self) -> int:
        return self.channels * self.kernel_size**2

    @property
    def tokens(self) -> int:
        return ((self.size + 2 * self.padding - self.kernel_size) // self.stride + 1) ** 2


LAYERS = {
    "L1": Layer(3, 224, 7, 4, 2),
    "L2": Layer(64, 56, 3, 2, 1),
    "L3": Layer(64, 28, 3, 2, 1),
}


@dataclass(frozen=True)
class Row:
    """A measurement. ``size`` is a layer or, for a whole module, the image size."""

    op: str
    size: str
    batch: int
    dtype: str
    direction: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.op}-{self.size}-B{self.batch}-{self.dtype}-{self.direction}-{self.backend}"


def sizes(op: str) -> tuple[str, ...]:
    if op in MODULES:
        return (IMAGE,)
    # Only a projection follows the third split.
    return tuple(LAYERS) if op.startswith("soft_split") else ("L1", "L2")


def batch_of(op: str) -> int:
    """Images per call: enough to use the device, and few enough for the reference's T×T scores."""
    if DEVICE.type == "cpu":
        return 4
    return 32 if op.startswith("t") else 128


def backends(op: str, dtype: str) -> list[str]:
    """The reference and our own backends that run ``op`` in ``dtype`` here, at the models' sizes."""
    if op in MODULES:
        return ["reference", "fused"]
    operation, sizes = OPERATIONS[op], {"E": EMBED, "m": FEATURES, "M": EMBED}
    return ["reference"] + [
        name
        for name in operation.kernels
        if why_unavailable(name, DEVICE) is None and operation.takes(name, DTYPES[dtype], **sizes)
    ]


def rows(batch: int | None = None, compiled: bool = False, smoke: bool = False) -> list[Row]:
    """Every row that this machine can run.

    Args:
        batch: Images per call; None for the default of the device.
        compiled: Include rivals with torch.compile, for full passes only, because compiling is slow.
        smoke: Exclude the backward of 3136² scores, which takes seconds on a CPU.
    """
    found = []
    for op in (*OPERATIONS, *MODULES):
        for size, dtype, direction in itertools.product(sizes(op), DTYPES, PASSES):
            if smoke and softmax(op) and size != "L2" and direction != "forward":
                continue
            names = backends(op, dtype)
            for name, rival in RIVALS.items():
                wanted = not rival.compiled or (compiled and direction == "full")
                if wanted and rival.applies(op, size, dtype, DEVICE):
                    names.append(name)
            shape = (op, size, batch or batch_of(op), dtype, direction)
            found += [Row(*shape, name) for name in names]
    return found
