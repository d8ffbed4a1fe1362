"""The attention of a Performer layer, and how well its random features approximate softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor

from t2t_kernels import soft_split_linear
from t2tvit.models import TokenPerformer, TokenTransformer

# The number of queries to compare, evenly spaced over the map, and numbers of new features.
QUERIES = 256
FEATURE_COUNTS = (32, 64, 128, 256, 512, 1024)
EPS = 1e-8
SEED = 0


@dataclass(frozen=True)
class Approximation:
    """The difference of an attention from softmax, averaged over the queries of all images.

    ``distance`` is the share of the softmax weights that the attention does not cover, from 0 (equal)
    to 1 (nothing in common). ``output_error`` is the relative error of the output. ``mass`` is the sum
    of a query's weights, which the published eps makes less than 1; the rest counts as not covered.
    """

    distance: float
    output_error: float
    mass: float


@dataclass(frozen=True)
class Study:
    """The attention of a T2T layer for images, at the queries in ``positions``.

    ``maps`` (B, positions, h, w) is the attention of the layer, ``softmax`` that of exp(q·k), which the
    Performer's features approximate. For a transformer layer both are equal. ``approximations`` has
    the layer's own features under "own", a uniform attention under "uniform", and new features under
    their number; it is empty for a transformer layer.
    """

    positions: list[tuple[int, int]]
    maps: Tensor
    softmax: Tensor
    approximations: dict[str | int, Approximation]


@torch.no_grad()
def study(layer: TokenPerformer | TokenTransformer, x: Tensor, grid: tuple[int, int]) -> Study:
    """Compute the attention of a layer for the maps ``x`` (B, C, H, W) with tokens on ``grid``."""
    performer = isinstance(layer, TokenPerformer)
    linear = layer.kqv if performer else layer.attn["qkv"]
    projected = soft_split_linear(
        x.double(),
        linear.weight.double(),
        None if linear.bias is None else linear.bias.double(),
        layer.norm1.weight.double(),
        layer.norm1.bias.double(),
        **layer.split,
        backend="reference",
    ).cpu()
    first, second, v = projected.chunk(3, dim=2)
    k, q = (first, second) if performer else (second, first * layer.scale)
    height, width = grid
    quarters = [(y, x) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    positions = [(round((height - 1) * y), round((width - 1) * x)) for y, x in quarters]
    shown = [y * width + x for y, x in positions]
    softmax = softmax_attention(q[:, shown], k)
    if not performer:
        maps = softmax.unflatten(2, grid)
        return Study(positions, maps, maps, {})
    w = layer.w.double().cpu()
    own = feature_attention(q[:, shown], k, w)
    chosen = torch.linspace(0, q.shape[1] - 1, min(QUERIES, q.shape[1])).round().long()
    asked, exact = q[:, chosen], softmax_attention(q[:, chosen], k)
    generator = torch.Generator().manual_seed(SEED)
    found: dict[str | int, Approximation] = {
        "own": compare(feature_attention(asked, k, w), exact, v)
    }
    found["uniform"] = compare(torch.full_like(exact, 1 / exact.shape[2]), exact, v)
    for count in FEATURE_COUNTS:
        fresh = orthogonal_features(count, w.shape[1], generator)
        found[count] = compare(feature_attention(asked, k, fresh), exact, v)
    return Study(positions, own.unflatten(2, grid), softmax.unflatten(2, grid), found)


def softmax_attention(q: Tensor, k: Tensor) -> Tensor:
    """Weights (B, queries, T) of exp(q·k)."""
    return (q @ k.transpose(1, 2)).softmax(-1)


def feature_attention(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Weights (B, queries, T) of positive random features ``w`` (m, E), with the published eps."""
    log_k = k @ w.t() - k.square().sum(2, keepdim=True) / 2
    log_q = q @ w.t() - q.square().sum(2, keepdim=True) / 2
    # Maxima that cancel keep the exponentials in range.
    maximum_k = log_k.amax(1, keepdim=True)
    maximum_q = (log_q + maximum_k).amax(2, keepdim=True)
    weights = (log_q + maximum_k - maximum_q).exp() @ (log_k - maximum_k).exp().transpose(1, 2)
    eps = EPS * w.shape[0] * (-maximum_q).exp()
    return weights / (weights.sum(2, keepdim=True) + eps)


def orthogonal_features(count: int, width: int, generator: torch.Generator) -> Tensor:
    """New unbiased features (count, width): blocks of orthogonal rows of length √width.

    The published ones have rows of length √count and approximate another kernel than softmax.
    """
    blocks: list[Tensor] = []
    while sum(len(block) for block in blocks) < count:
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        blocks.append(torch.linalg.qr(square).Q.t() * width**0.5)
    return torch.cat(blocks)[:count]


def compare(weights: Tensor, exact: Tensor, v: Tensor) -> Approximation:
    return Approximation(
        distance=(exact - weights).clamp_min(0).sum(2).mean().item(),
        output_error=((weights @ v - exact @ v).norm() / (exact @ v).norm()).item(),
        mass=weights.sum(2).mean().item(),
    )
