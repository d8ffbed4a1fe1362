"""Records feature maps, attention, and the inputs of T2T layers during a forward."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from t2tvit.models import T2TModule
from t2tvit.models.backbone import Attention

# The maximum number of class, distillation and register tokens before those of the image.
MOST_PREFIX_TOKENS = 8
# The aspect ratio of a grid is that of the image, up to the rounding of small grids.
MOST_DISTORTION = 0.2
# If the recomputed output of an attention has a larger error, its kind is unknown.
ATTENTION_ERROR = 1e-3
# A channel is dead if it is nowhere larger than DEAD times the layer's largest value, and exploding if
# it is somewhere not finite or EXPLODING times as large as the median channel's largest value.
DEAD = 1e-7
EXPLODING = 10.0


@dataclass(frozen=True)
class Layer:
    """The feature maps (B, C, h, w) of a layer, and its dead and exploding channels.

    A dead channel is dead in every image, an exploding one explodes in at least one image.
    """

    name: str
    maps: Tensor

    @cached_property
    def peaks(self) -> Tensor:
        """Largest magnitude of each channel in each image (B, C); infinite if not finite."""
        return self.maps.abs().nan_to_num(math.inf, math.inf, math.inf).amax((2, 3))

    @cached_property
    def dead(self) -> list[int]:
        finite = self.peaks[self.peaks.isfinite()]
        largest = finite.max().item() if finite.numel() else 0.0
        return torch.nonzero((self.peaks <= DEAD * largest).all(0)).flatten().tolist()

    @cached_property
    def exploding(self) -> list[int]:
        median = self.peaks.median(1, keepdim=True).values
        too_large = (self.peaks > EXPLODING * median) | ~self.peaks.isfinite()
        # If most channels are dead, the median is no reference.
        too_large &= (median > 0) | ~self.peaks.isfinite()
        return torch.nonzero(too_large.any(0)).flatten().tolist()


@dataclass
class Attended:
    """Attention of the class token; without a class token, the average over all tokens.

    ``heads`` has (B, heads, h, w) for each layer. ``rollout`` (B, h, w) is the product of the layers'
    mean attentions with skips (Abnar and Zuidema, "Quantifying attention flow", 2020).
    """

    names: list[str] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    rollout: Tensor | None = None
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recorded:
    """``t2t`` has the layers of T2T modules with their names and input maps."""

    logits: Tensor
    layers: list[Layer]
    attended: Attended
    t2t: list[tuple[str, nn.Module, Tensor]]


@torch.no_grad()
def record(model: nn.Module, images: Tensor) -> Recorded:
    """Run a model on ``images`` (B, C, H, W) and record the outputs of its layers."""
    size = (images.shape[2], images.shape[3])
    layers, t2t, attentions = [], [], _Attentions(size)
    handles = []

    def keep(name):
        def hook(module, inputs, output):
            maps = as_maps(output, size)
            if maps is not None:
                layers.append(Layer(name, maps.detach().float().cpu().clone()))

        return hook

    def keep_input(name):
        def hook(module, inputs):
            t2t.append((name, module, inputs[0].detach().float()))

        return hook

    for name, module in layers_of(model):
        handles.append(module.register_forward_hook(keep(name)))
    for name, module in model.named_modules():
        if isinstance(module, T2TModule):
            for part in ("attention1", "attention2"):
                layer = getattr(module, part)
                handles.append(layer.register_forward_pre_hook(keep_input(join(name, part))))
        if hasattr(module, "num_heads") and hasattr(module, "proj"):
            handles.append(module.register_forward_hook(attentions.hook(name)))
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return Recorded(logits.float().cpu(), layers, attentions.attended, t2t)


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def layers_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's layers in order: the members of its containers and of its T2T module."""
    for name, module in model.named_children():
        name = join(prefix, name)
        if isinstance(module, nn.Identity | nn.Dropout):
            continue
        if isinstance(module, T2TModule):
            yield join(name, "attention1"), module.attention1
            yield join(name, "attention2"), module.attention2
            yield join(name, "project"), module
        elif isinstance(module, nn.Sequential | nn.ModuleList) or any(
            isinstance(child, T2TModule) for child in module.children()
        ):
            yield from layers_of(module, name)
        else:
            yield name, module


def as_maps(output: object, size: tuple[int, int]) -> Tensor | None:
    """A layer's output as maps (B, C, h, w) for images of ``size``; None if that is not possible."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.dim() == 4:
        _, first, second, third = output.shape
        channels_last = _distortion(first, second, size) < _distortion(second, third, size)
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.dim() == 3:
        found = grid_of(output.shape[1], size)
        if found is not None:
            prefix, grid = found
            return output[:, prefix:].transpose(1, 2).unflatten(2, grid)
    return None


def grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
    """The number of prefix tokens among ``tokens``, and the grid (h, w) of the image's tokens."""
    found = []
    for prefix in range(min(MOST_PREFIX_TOKENS + 1, tokens)):
        count = tokens - prefix
        h = max(1, round(math.sqrt(count * size[0] / size[1])))
        if count % h == 0:
            found.append((_distortion(h, count // h, size), prefix, (h, count // h)))
    distortion, prefix, grid = min(found, default=(math.inf, 0, (1, 1)))
    return (prefix, grid) if distortion < MOST_DISTORTION else None


def _distortion(h: int, w: int, size: tuple[int, int]) -> float:
    """The absolute logarithm of the ratio of a grid's aspect ratio and the image's."""
    return abs(math.log(h / w * size[1] / size[0]))


class _Attentions:
    """Hooks that recompute the attention of each layer from its input."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.attended = size, Attended()
        self.product: Tensor | None = None

    def hook(self, name: str):
        def hook(module, inputs, output):
            shares = probabilities(module, inputs[0], output)
            found = None if shares is None else grid_of(shares.shape[-1], self.size)
            if shares is None or found is None:
                self.attended.unknown.append(name)
                return
            prefix, grid = found
            # The class token's row, or without one the mean over all rows.
            rows = shares[:, :, 0] if prefix else shares.mean(2)
            self.attended.names.append(name)
            self.attended.heads.append(rows[..., prefix:].unflatten(2, grid).cpu())
            step = (shares.mean(1) + torch.eye(shares.shape[-1], device=shares.device)) / 2
            before = self.product
            if before is not None and before.shape == step.shape:
                step = step @ before
            self.product = step
            row = step[:, 0] if prefix else step.mean(1)
            self.attended.rollout = row[:, prefix:].unflatten(1, grid).cpu()

        return hook


def is_plain(attention: nn.Module) -> bool:
    """Whether a module has the attributes of timm's plain attention."""
    qkv, proj = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    return (
        isinstance(qkv, nn.Linear)
        and isinstance(proj, nn.Linear)
        and qkv.out_features == 3 * proj.in_features
        and hasattr(attention, "scale")
        and hasattr(attention, "num_heads")
    )


def probabilities(attention: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
    """Attention weights (B, heads, N, N) for the input ``x``; None for unknown kinds of attention.

    The attention of this package and timm's plain one are supported. The output that follows from
    the weights must agree with ``output``.
    """
    if not isinstance(x, Tensor) or x.dim() != 3 or not isinstance(output, Tensor):
        return None
    if isinstance(attention, Attention):
        q, k, v = attention.inputs(x)
    elif is_plain(attention):
        q, k, v = attention.qkv(x).chunk(3, dim=2)
    else:
        return None
    q, k, v = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    identity: Any = nn.Identity()
    q = getattr(attention, "q_norm", identity)(q)
    k = getattr(attention, "k_norm", identity)(k)
    shares = (q.float() * attention.scale @ k.float().transpose(2, 3)).softmax(-1)
    y = (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    y = getattr(attention, "norm", identity)(y)
    y = attention.output(y) if isinstance(attention, Attention) else attention.proj(y)
    if y.shape != output.shape or (y - output).norm() > ATTENTION_ERROR * output.norm():
        return None
    return shares
