"""Designs of CNNs in T2T-ViT: SE, Ghost and Dense (section 3.2 of the T2T-ViT paper).

The paper's ResNeXt (32 heads) and wide (768 channels, 4 blocks) are plain configurations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2tvit.errors import InputError
from t2tvit.models.backbone import Attention, Block, T2TBackbone
from t2tvit.models.bounds import check_integer, check_rate


class SqueezeExcitation(nn.Module):
    """Scales each channel of (B, T, dim) by a gate in (0, 1), computed from the means over T."""

    def __init__(self, dim: int):
        super().__init__()
        squeezed = dim // 16
        if squeezed < 1:
            raise InputError(f"embed_dim: got {dim}, squeeze-excitation needs at least 16")
        self.fc = nn.Sequential(
            nn.Linear(dim, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=1, keepdim=True))


class SEAttention(Attention):
    """Attention with a squeeze-excitation gate on its output, before the dropout."""

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.se_layer = SqueezeExcitation(dim)

    def output(self, y: Tensor) -> Tensor:
        return self.se_layer(self.proj(y))


class CheapOperation(nn.Module):
    """Depthwise 1 × 1 convolution without bias over (B, T, dim): one factor per channel.

    The weight has the shape (dim, 1, 1) and the default initialisation of a Conv1d, uniform in ±1.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 1).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.flatten().to(x.dtype)


class GhostAttention(Attention):
    """Attention whose queries, keys and values are half linear and half cheap operations on them."""

    def init_inputs(self, dim: int) -> None:
        if dim % 2 != 0:
            raise InputError(f"embed_dim: got {dim}, Ghost attention needs an even one")
        self.q = nn.Linear(dim, dim // 2, bias=False)
        self.k = nn.Linear(dim, dim // 2, bias=False)
        self.v = nn.Linear(dim, dim // 2, bias=False)
        self.cheap_operation_q = CheapOperation(dim // 2)
        self.cheap_operation_k = CheapOperation(dim // 2)
        self.cheap_operation_v = CheapOperation(dim // 2)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return (
            torch.cat([q, self.cheap_operation_q(q)], dim=2),
            torch.cat([k, self.cheap_operation_k(k)], dim=2),
            torch.cat([v, self.cheap_operation_v(v)], dim=2),
        )


class GhostMlp(nn.Module):
    """MLP whose hidden layer is one third linear and two thirds cheap operations on it."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        if hidden_dim != 3 * dim:
            raise InputError(f"mlp_ratio: got {hidden_dim / dim:g}, expected 3 for the Ghost MLP")
        self.fc1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.cheap_operation2 = CheapOperation(dim)
        self.cheap_operation3 = CheapOperation(dim)
        self.fc2 = nn.Linear(3 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.act(self.fc1(x))
        x2 = self.act(self.cheap_operation2(x1))
        x3 = self.act(self.cheap_operation3(x1))
        return self.drop(self.fc2(self.drop(torch.cat([x1, x2, x3], dim=2))))


class DenseBlock(Block):
    """Block that appends ``growth_rate`` channels, computed from its result, to its input."""

    def __init__(self, dim: int, growth_rate: int, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.dense_linear(super().forward(x))], dim=2)


class Transition(nn.Module):
    """Halves the width between two stages of dense blocks."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim // 2)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class T2TDenseVisionTransformer(T2TBackbone):
    """T2T-ViT with densely connected blocks.

    Args:
        embed_dim: Width of the first block, the class token and the position embedding.
        stages: Number of blocks of each stage; the width is halved between stages.
        growth_rate: Channels that a block adds.
        num_heads: Attention heads, a divisor of every block's width.
        mlp_ratio: Hidden width of the MLP, relative to the block's width.
        qk_scale: Softmax scale; None means (width / num_heads)^-½.
        drop_rate: Dropout after the position embedding, the attention's output and the MLP's layers.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth. As published, every block of stage i has the i-th of 12
            values that grow linearly from 0 to this rate; only the first 4 values are used.
        stem: The keyword arguments of :class:`T2TBackbone`.

    Raises:
        InputError: An argument is invalid.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 128,
        stages: Sequence[int] = (3, 6, 6, 4),
        growth_rate: int = 64,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **stem,
    ):
        check_integer("embed_dim", embed_dim)
        check_integer("growth_rate", growth_rate)
        if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
            raise InputError(f"stages: got {stages!r}, expected a number of blocks for each stage")
        for count in stages:
            check_integer("stages", count)
        check_rate("drop_rate", drop_rate)
        check_rate("attn_drop_rate", attn_drop_rate)
        check_rate("drop_path_rate", drop_path_rate)
        blocks: list[nn.Module] = []
        dim = embed_dim
        for stage, count in enumerate(stages):
            if stage > 0:
                blocks.append(Transition(dim))
                dim //= 2
            for _ in range(count):
                block = DenseBlock(
                    dim,
                    growth_rate,
                    num_heads,
                    mlp_ratio,
                    qk_scale,
                    drop_rate,
                    attn_drop_rate,
                    drop_path_rate * stage / 11,
                )
                blocks.append(block)
                dim += growth_rate
        super().__init__(blocks, embed_dim, dim, drop_rate=drop_rate, **stem)
