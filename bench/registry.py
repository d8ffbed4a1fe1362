"""What is measured: operation × shape × dtype × pass × backend.

A backend that gains a kernel gains its rows here by itself, from the table of operations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from t2t_kernels import (
    PerformerLayerParams,
    TransformerLayerParams,
    performer_attention,
    performer_layer,
    soft_split,
    soft_split_linear,
    token_attention,
    transformer_layer,
)
from t2t_kernels.backends import BACKENDS, OPERATIONS, why_unavailable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Enough to keep the device busy: images per call.
BATCH = {"cpu": 4, "cuda": 128}[DEVICE.type]
EMBED, FEATURES, CLASS_WIDTH = 64, 32, 384
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "full")


@dataclass(frozen=True)
class Layer:
    """A soft split of T2T-ViT at 224×224 pixels."""

    channels: int
    size: int
    kernel_size: int
    stride: int
    padding: int

    @property
    def split(self) -> dict[str, int]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
        }

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
    op: str
    layer: str
    dtype: str
    direction: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.op}-{self.layer}-B{BATCH}-{self.dtype}-{self.direction}-{self.backend}"


def rows() -> list[Row]:
    """Every row that this machine can run."""
    found = []
    for op, operation in OPERATIONS.items():
        # The third split is followed by a projection alone.
        layers = LAYERS if op.startswith("soft_split") else ("L1", "L2")
        for backend in BACKENDS:
            if backend not in ("reference", *operation.kernels) or why_unavailable(backend, DEVICE):
                continue
            for layer in layers:
                for dtype in DTYPES:
                    found += [Row(op, layer, dtype, each, backend) for each in PASSES]
    return found


def workload(
    row: Row, exact: bool = False
) -> tuple[Callable[[str], Tensor], list[Tensor], tuple[int, ...]]:
    """A call of the row's operation by backend, the tensors to differentiate, the input's shape.

    ``exact`` gives the same numbers, rounded to the row's dtype, as float64.
    """
    torch.manual_seed(0)
    layer, dtype = LAYERS[row.layer], DTYPES[row.dtype]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = (torch.randn(shape, device=DEVICE) * scale).to(dtype)
        tensor = tensor.double() if exact else tensor
        return tensor.requires_grad_(row.direction == "full")

    def matrix(outputs: int, inputs: int) -> Tensor:
        return random(outputs, inputs, scale=inputs**-0.5)

    if row.op in ("performer_attention", "token_attention"):
        shape = (BATCH, layer.tokens, EMBED)
        # Half of unit rms: where trained models work, and eps does not yet rule the Performer.
        k, q, v = (random(*shape, scale=0.5) for _ in range(3))
        if row.op == "token_attention":
            scale = layer.width**-0.5
            return lambda backend: token_attention(q, k, v, scale=scale, backend=backend), [q, k, v], shape
        w = torch.randn(FEATURES, EMBED, device=DEVICE)
        return lambda backend: performer_attention(k, q, v, w, backend=backend), [k, q, v], shape

    shape = (BATCH, layer.channels, layer.size, layer.size)
    x = random(*shape)
    if row.layer != "L1":
        # A layer's output is the next one's channels-last map.
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
    # The first layer's map is the image, which asks for no gradient.
    leaves = [] if row.layer == "L1" and row.op != "soft_split" else [x]
    if row.op == "soft_split":
        return lambda backend: soft_split(x, **layer.split, backend=backend), leaves, shape

    norm = [random(layer.width), random(layer.width)]
    if row.op == "soft_split_linear":
        outputs = CLASS_WIDTH if row.layer == "L3" else 3 * EMBED
        parameters = [matrix(outputs, layer.width), random(outputs)]
        if row.layer != "L3":
            parameters += norm
        return (
            lambda backend: soft_split_linear(x, *parameters, **layer.split, backend=backend),
            leaves + parameters,
            shape,
        )
    tail = [random(EMBED), random(EMBED), matrix(EMBED, EMBED), random(EMBED), matrix(EMBED, EMBED)]
    attention = [matrix(EMBED, EMBED), random(EMBED)]
    if row.op == "performer_layer":
        w = torch.randn(FEATURES, EMBED, device=DEVICE)
        kqv = [matrix(3 * EMBED, layer.width), random(3 * EMBED)]
        params = PerformerLayerParams(w, *norm, *kqv, *attention, *tail, random(EMBED))
        return (
            lambda backend: performer_layer(
                x, params, **layer.split, dropout_p=0.1, seed=0, backend=backend
            ),
            leaves + list(params[1:]),
            shape,
        )
    qkv = [matrix(3 * EMBED, layer.width)]
    params = TransformerLayerParams(*norm, *qkv, *attention, *tail, random(EMBED))
    scale = layer.width**-0.5
    return (
        lambda backend: transformer_layer(x, params, **layer.split, scale=scale, backend=backend),
        leaves + list(params),
        shape,
    )
