"""The backbone of T2T-ViT: class token, fixed positions, pre-norm transformer blocks, head."""

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from t2t_kernels.transforms import active_transform
from t2tvit.errors import InputError
from t2tvit.models.bounds import check_image_size, check_integer, check_positive, check_rate
from t2tvit.models.patch_tokens import PatchTokens
from t2tvit.models.positions import resize_positions, sinusoid
from t2tvit.models.t2t_module import T2TModule


def init_weights(module: nn.Module) -> None:
    """Initialise linear layers: truncated normal weights with deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, dropout_p: float
) -> Tensor:
    """Multi-head attention over (B, T, dim); head h has the channels h·dim/num_heads onwards."""
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    # PyTorch's fused attentions do not support forward-mode AD and second derivatives.
    transformed = active_transform((q, k, v)) is not None
    with sdpa_kernel(SDPBackend.MATH) if transformed else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention over (B, T, dim), without bias on queries, keys and values.

    Args:
        dim: Width, a multiple of ``num_heads``.
        qk_scale: Softmax scale; None means (dim / num_heads)^-½.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        check_integer("num_heads", num_heads)
        if dim % num_heads != 0:
            raise InputError(f"num_heads: got {num_heads}, expected a divisor of the width {dim}")
        self.num_heads = num_heads
        if qk_scale is None:
            qk_scale = (dim // num_heads) ** -0.5
        self.scale = check_positive("qk_scale", qk_scale)
        self.attn_drop = attn_drop
        self.init_inputs(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_inputs(self, dim: int) -> None:
        """Create the parameters of :meth:`inputs`."""
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, T, dim)."""
        return self.qkv(x).chunk(3, dim=2)

    def output(self, y: Tensor) -> Tensor:
        """Project the concatenated output (B, T, dim) of the heads, before dropout."""
        return self.proj(y)

    def forward(self, x: Tensor) -> Tensor:
        dropout_p = self.attn_drop if self.training else 0.0
        y = attend(*self.inputs(x), self.num_heads, self.scale, dropout_p)
        return self.proj_drop(self.output(y))


class Mlp(nn.Module):
    """Linear layers dim → hidden_dim → dim with GELU between them, and dropout after each."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training, the branch of a sample is dropped with probability ``rate``."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Block(nn.Module):
    """Pre-norm transformer block over (B, T, dim): attention, then MLP, each with its skip."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        attention_layer: Callable[..., nn.Module] = Attention,
        mlp_layer: Callable[..., nn.Module] = Mlp,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention_layer(dim, num_heads, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp_layer(dim, int(dim * check_positive("mlp_ratio", mlp_ratio)), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class T2TBackbone(nn.Module):
    """T2T module, class token and positions, a stack of blocks, norm and head.

    Args:
        blocks: Modules (B, 1 + T, embed_dim) → … → (B, 1 + T, num_features).
        embed_dim: Width of the input of the blocks.
        num_features: Width of the output of the blocks.
        img_size: The image size of the position embedding, an integer or (height, width). For images
            of any other size ≥ 16, the position embedding is resized.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 for no head.
        tokens_type: Layers of the T2T module: "performer", "transformer" or "convolution"; or "patch"
            to replace the module by 16 × 16 patches, as in ViT.
        token_dim: Width inside the T2T module.
        drop_rate: Dropout after the position embedding.
        fused_kernels: See :meth:`set_fused_kernels`.

    Raises:
        InputError: An argument is invalid.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        embed_dim: int,
        num_features: int,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        tokens_type: str = "performer",
        token_dim: int = 64,
        drop_rate: float = 0.0,
        fused_kernels: str = "auto",
    ):
        super().__init__()
        self.img_size = check_image_size(img_size)
        self.embed_dim = embed_dim
        self.num_features = num_features
        self.grad_checkpointing = False

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        if tokens_type == "patch":
            tokens_to_token = PatchTokens(in_chans, embed_dim)
        else:
            tokens_to_token = T2TModule(tokens_type, in_chans, embed_dim, token_dim)
        self.grid_size = tokens_to_token.grid_size(*self.img_size)
        positions = 1 + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(sinusoid(positions, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self.tokens_to_token = tokens_to_token
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(num_features)

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)
        self.reset_classifier(num_classes)
        self.set_fused_kernels(fused_kernels)

    @property
    def fused_kernels(self) -> str:
        """The backend of the T2T module, as given to :meth:`set_fused_kernels`."""
        return self.tokens_to_token.backend or "auto"

    def set_fused_kernels(self, name: str) -> None:
        """Choose the backend of the T2T module.

        Args:
            name: A backend of `t2t_kernels` ("reference", "cpu", "triton", "cuda"), whose forward
                fails if it cannot run, or "auto" for the first available one.

        Raises:
            InputError: The backend is unknown.
        """
        self.tokens_to_token.set_fused_kernels(name)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward instead of saving their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or an Identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialised one with ``num_classes`` outputs (0: none)."""
        self.num_classes = check_integer("num_classes", num_classes, least=0)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            like = self.norm.weight
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            init_weights(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay that are not one-dimensional."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of the parameters by depth: stem, each block, norm, head."""
        return {
            "stem": r"^cls_token|^pos_embed|^tokens_to_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def positions(self, height: int, width: int) -> Tensor:
        """Position embedding (1, 1 + T, embed_dim) for images of ``height`` × ``width``."""
        grid = self.tokens_to_token.grid_size(height, width)
        if grid == self.grid_size:
            return self.pos_embed
        return resize_positions(self.pos_embed, self.grid_size, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, 1 + T, num_features) after the last norm.

        Token 0 is the class token.
        """
        tokens = self.tokens_to_token(x)
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1)
        positions = self.positions(x.shape[2], x.shape[3])
        x = self.pos_drop(torch.cat([cls_token, tokens], dim=1) + positions)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits (B, num_classes); with ``pre_logits`` the class token's (B, num_features)."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class T2TVisionTransformer(T2TBackbone):
    """T2T-ViT with equal blocks (section 3.2 of the T2T-ViT paper).

    Args:
        embed_dim: Width.
        depth: Number of blocks.
        num_heads: Attention heads, a divisor of ``embed_dim``.
        mlp_ratio: Hidden width of the MLP, relative to ``embed_dim``.
        qk_scale: Softmax scale; None means (embed_dim / num_heads)^-½.
        drop_rate: Dropout after the position embedding, the attention's output and the MLP's layers.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        attention_layer: Called with (dim, num_heads, qk_scale, attn_drop, proj_drop).
        mlp_layer: Called with (dim, hidden_dim, drop).
        stem: The keyword arguments of :class:`T2TBackbone`.

    Raises:
        InputError: An argument is invalid.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_layer: Callable[..., nn.Module] = Attention,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        **stem,
    ):
        check_integer("embed_dim", embed_dim)
        check_integer("depth", depth)
        check_rate("drop_rate", drop_rate)
        check_rate("attn_drop_rate", attn_drop_rate)
        check_rate("drop_path_rate", drop_path_rate)
        blocks = [
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                drop_path_rate * i / max(depth - 1, 1),
                attention_layer,
                mlp_layer,
            )
            for i in range(depth)
        ]
        super().__init__(blocks, embed_dim, embed_dim, drop_rate=drop_rate, **stem)
