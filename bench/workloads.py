"""The tensors and the call of a row, for checks and timing."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.kernel_rows import (
    CLASS_WIDTH,
    DEVICE,
    DTYPES,
    EMBED,
    FEATURES,
    LAYERS,
    MODULES,
    Row,
)
from bench.rivals import RIVALS
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
from t2tvit.models.t2t_module import T2TModule

# The dropout rate of the layers in training, as published.
DROPOUT = 0.1
# The RMS of keys and queries: as in trained models, and such that eps does not dominate the Performer.
RMS = 0.5


@dataclass
class Workload:
    """``forward()`` is the row's call, ``leaves`` are the tensors with gradients.

    ``shape`` is the shape of the input.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    shape: tuple[int, ...]


def workload(row: Row, exact: bool = False, seed: int | None = None) -> Workload:
    """The row's tensors, with the same values for every backend, and its call.

    Args:
        exact: Use float64 with the same values, rounded to the row's dtype.
        seed: Seed of dropout, so that backends can be compared; whole modules then use no dropout. With
            None, each backend draws masks in its own way, as in training.
    """
    torch.manual_seed(0)
    dtype = DTYPES[row.dtype]
    stored = torch.float32 if row.backend == "autocast" else dtype
    stored = torch.float64 if exact else stored
    make = {"performer_attention": _attention, "token_attention": _attention}.get(row.op)
    make = make or (_module if row.op in MODULES else _map_operation)
    call, leaves, shape = make(row, _Numbers(dtype, stored, row.direction != "forward"), seed)
    if row.backend in RIVALS:
        forward = RIVALS[row.backend].wrap(lambda: call("reference"), row.dtype, DEVICE)
    else:
        forward = lambda: call(row.backend)  # noqa: E731
    if row.direction == "forward":
        forward = torch.no_grad()(forward)
    return Workload(forward, leaves, shape)


def step(row: Row) -> Callable[[], object]:
    """The function to time: the pass of ``row``."""
    ready = workload(row)
    if row.direction == "forward":
        return ready.forward
    if row.direction == "full":
        return lambda: gradients(ready, y := ready.forward(), torch.ones_like(y))
    y = ready.forward()
    grad = torch.ones_like(y)
    return lambda: gradients(ready, y, grad, retain_graph=True)


def gradients(ready: Workload, y: Tensor, grad: Tensor, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, ready.leaves, grad, **options)


@dataclass(frozen=True)
class _Numbers:
    """Random tensors with values of ``dtype``, stored as ``stored``."""

    dtype: torch.dtype
    stored: torch.dtype
    learned: bool

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        tensor = (torch.randn(shape, device=DEVICE) * scale).to(self.dtype).to(self.stored)
        return tensor.requires_grad_(self.learned)

    def matrix(self, outputs: int, inputs: int, scale: float = 1.0) -> Tensor:
        return self.random(outputs, inputs, scale=scale * inputs**-0.5)


def _attention(row: Row, numbers: _Numbers, seed: int | None):
    layer = LAYERS[row.size]
    shape = (row.batch, layer.tokens, EMBED)
    k, q, v = leaves = [numbers.random(*shape, scale=RMS) for _ in range(3)]
    if row.op == "token_attention":
        scale = layer.width**-0.5
        return lambda backend: token_attention(q, k, v, scale=scale, backend=backend), leaves, shape
    w = torch.randn(FEATURES, EMBED, device=DEVICE)
    return lambda backend: performer_attention(k, q, v, w, backend=backend), leaves, shape


def _map_operation(row: Row, numbers: _Numbers, seed: int | None):
    layer, random, matrix = LAYERS[row.size], numbers.random, numbers.matrix
    shape = (row.batch, layer.channels, layer.size, layer.size)
    x = random(*shape)
    if row.size != "L1":
        # The output of a layer is a channels-last map for the next layer.
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
    # The first layer's map is the image, which needs no gradient.
    leaves = [] if row.size == "L1" and row.op != "soft_split" else [x]
    if row.op == "soft_split":
        return lambda backend: soft_split(x, **layer.split, backend=backend), leaves, shape
    if not leaves:
        x.requires_grad_(False)

    norm = [random(layer.width), random(layer.width)]
    if row.op == "soft_split_linear":
        outputs = CLASS_WIDTH if row.size == "L3" else 3 * EMBED
        weight, bias = matrix(outputs, layer.width), random(outputs)
        norms = norm if row.size != "L3" else []
        return (
            lambda backend: soft_split_linear(
                x, weight, bias, *norms, **layer.split, backend=backend
            ),
            [*leaves, weight, bias, *norms],
            shape,
        )
    attention = [matrix(EMBED, EMBED), random(EMBED)]
    tail = [random(EMBED), random(EMBED), matrix(EMBED, EMBED), random(EMBED)]
    tail += [matrix(EMBED, EMBED), random(EMBED)]
    if row.op == "performer_layer":
        w = torch.randn(FEATURES, EMBED, device=DEVICE)
        # The norm's random scale and shift have an rms of √2 together; √½ each for these two.
        kqv = [matrix(3 * EMBED, layer.width, RMS / 2), random(3 * EMBED, scale=RMS / 2**0.5)]
        params = PerformerLayerParams(w, *norm, *kqv, *attention, *tail)
        dropout_p = DROPOUT if row.direction != "forward" else 0.0
        return (
            lambda backend: performer_layer(
                x, params, **layer.split, dropout_p=dropout_p, seed=seed, backend=backend
            ),
            leaves + list(params[1:]),
            shape,
        )
    qkv = [matrix(3 * EMBED, layer.width)]
    params = TransformerLayerParams(*norm, *qkv, *attention, *tail)
    scale = layer.width**-0.5
    return (
        lambda backend: transformer_layer(x, params, **layer.split, scale=scale, backend=backend),
        leaves + list(params),
        shape,
    )


def _module(row: Row, numbers: _Numbers, seed: int | None):
    module = T2TModule(MODULES[row.op].removesuffix("_layer"), embed_dim=CLASS_WIDTH)
    module = module.to(DEVICE, numbers.dtype).to(numbers.stored)
    module.train(row.direction != "forward" and seed is None)
    shape = (row.batch, 3, int(row.size), int(row.size))
    images = replace(numbers, learned=False).random(*shape)

    def call(backend: str) -> Tensor:
        module.backend = None if backend == "fused" else backend
        return module(images)

    return call, [p for p in module.parameters() if p.requires_grad], shape
