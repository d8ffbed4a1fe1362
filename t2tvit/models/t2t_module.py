"""The tokens-to-token module: turns an image into a short sequence of tokens.

It has three soft splits, with a layer after each of the first two and a linear projection after the
third (section 3.1 of the T2T-ViT paper). The modules hold the parameters with the names of the
published checkpoints; `t2t_kernels` has the operations.

The fused operations read the parameters of the submodules and do not call them. If a submodule differs
from what they compute (it has hooks, was replaced or wrapped), the layer calls its submodules instead.
"""

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2t_kernels import (
    BACKENDS,
    PerformerLayerParams,
    TransformerLayerParams,
    output_size,
    performer_attention,
    performer_layer,
    soft_split,
    soft_split_linear,
    token_attention,
    transformer_layer,
)
from t2t_kernels.arguments import autocast_dtype
from t2tvit.errors import InputError, unknown_name
from t2tvit.models.bounds import MIN_SIZE, check_integer
from t2tvit.models.plain import announce, why_not_plain


class SoftSplit(TypedDict):
    """The geometry of a soft split, in pixels of its map."""

    kernel_size: int
    stride: int
    padding: int


SPLITS = (
    SoftSplit(kernel_size=7, stride=4, padding=2),
    SoftSplit(kernel_size=3, stride=2, padding=1),
    SoftSplit(kernel_size=3, stride=2, padding=1),
)


# An operation of `t2t_kernels` and the sizes of a call, as `t2t_kernels.backends.explain` takes them.
Call = tuple[str, dict[str, int]]


class TokenPerformer(nn.Module):
    """Soft split and Performer layer with one head: (B, C, H, W) to (B, T, token_dim).

    ``w`` has token_dim // 2 frozen random features, orthogonal rows of length √(token_dim // 2). Both
    dropout rates are 0.1 in training, as published, independent of the backbone's rates.
    """

    dropout = 0.1

    def __init__(self, in_chans: int, token_dim: int, split: SoftSplit):
        super().__init__()
        in_dim = in_chans * split["kernel_size"] ** 2
        features = token_dim // 2
        self.in_chans, self.split = in_chans, split
        w = nn.init.orthogonal_(torch.empty(features, token_dim)) * features**0.5
        self.w = nn.Parameter(w, requires_grad=False)
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim)
        )

    def calls(self) -> list[Call]:
        if self._why_not_fused() is not None:
            m, width = self.w.shape
            return [("soft_split", {}), ("performer_attention", {"E": width, "m": m})]
        k, s = self.split["kernel_size"], self.split["stride"]
        return [("performer_layer", self._params().sizes(self.in_chans, k, s))]

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        if (reason := self._why_not_fused()) is not None:
            announce(reason, backend)
            return self._call_submodules(x, backend)
        dropout_p = self.dropout if self.training else 0.0
        params = self._params()
        return performer_layer(x, params, **self.split, dropout_p=dropout_p, backend=backend)

    def _params(self) -> PerformerLayerParams:
        return PerformerLayerParams(
            w=self.w,
            norm1_weight=self.norm1.weight,
            norm1_bias=self.norm1.bias,
            kqv_weight=self.kqv.weight,
            kqv_bias=self.kqv.bias,
            proj_weight=self.proj.weight,
            proj_bias=self.proj.bias,
            norm2_weight=self.norm2.weight,
            norm2_bias=self.norm2.bias,
            mlp_0_weight=self.mlp[0].weight,
            mlp_0_bias=self.mlp[0].bias,
            mlp_2_weight=self.mlp[2].weight,
            mlp_2_bias=self.mlp[2].bias,
        )

    def _why_not_fused(self) -> str | None:
        reason = (
            why_not_plain("norm1", self.norm1, nn.LayerNorm)
            or why_not_plain("kqv", self.kqv, nn.Linear)
            or why_not_plain("proj", self.proj, nn.Linear)
            or why_not_plain("norm2", self.norm2, nn.LayerNorm)
            or why_not_plain("mlp", self.mlp, nn.Sequential)
        )
        if reason is None and len(self.mlp) != 3:
            reason = f"mlp has {len(self.mlp)} modules"
        return (
            reason
            or why_not_plain("mlp.0", self.mlp[0], nn.Linear)
            or why_not_plain("mlp.1", self.mlp[1], nn.GELU)
            or why_not_plain("mlp.2", self.mlp[2], nn.Linear)
        )

    def _call_submodules(self, x: Tensor, backend: str | None) -> Tensor:
        tokens = soft_split(x, **self.split, backend=backend)
        k, q, v = self.kqv(self.norm1(tokens)).chunk(3, dim=-1)
        y = self.proj(performer_attention(k, q, v, self.w, backend=backend))
        y = v + F.dropout(y, self.dropout, self.training)
        return y + F.dropout(self.mlp(self.norm2(y)), self.dropout, self.training)


class TokenTransformer(nn.Module):
    """Soft split and softmax attention layer with one head: (B, C, H, W) to (B, T, token_dim).

    The softmax scale is the token width^-½ (147^-½, 576^-½), as published, not token_dim^-½.
    """

    def __init__(self, in_chans: int, token_dim: int, split: SoftSplit):
        super().__init__()
        in_dim = in_chans * split["kernel_size"] ** 2
        self.in_chans, self.token_dim, self.split = in_chans, token_dim, split
        self.scale = in_dim**-0.5
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(in_dim, 3 * token_dim, bias=False),
                "proj": nn.Linear(token_dim, token_dim),
            }
        )
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(token_dim, token_dim), "fc2": nn.Linear(token_dim, token_dim)}
        )

    def calls(self) -> list[Call]:
        if self._why_not_fused() is not None:
            return [("soft_split", {}), ("token_attention", {"E": self.token_dim})]
        k, s = self.split["kernel_size"], self.split["stride"]
        return [("transformer_layer", self._params().sizes(self.in_chans, k, s))]

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        if (reason := self._why_not_fused()) is not None:
            announce(reason, backend)
            return self._call_submodules(x, backend)
        params = self._params()
        return transformer_layer(x, params, **self.split, scale=self.scale, backend=backend)

    def _params(self) -> TransformerLayerParams:
        return TransformerLayerParams(
            norm1_weight=self.norm1.weight,
            norm1_bias=self.norm1.bias,
            attn_qkv_weight=self.attn["qkv"].weight,
            attn_proj_weight=self.attn["proj"].weight,
            attn_proj_bias=self.attn["proj"].bias,
            norm2_weight=self.norm2.weight,
            norm2_bias=self.norm2.bias,
            mlp_fc1_weight=self.mlp["fc1"].weight,
            mlp_fc1_bias=self.mlp["fc1"].bias,
            mlp_fc2_weight=self.mlp["fc2"].weight,
            mlp_fc2_bias=self.mlp["fc2"].bias,
        )

    def _why_not_fused(self) -> str | None:
        return (
            why_not_plain("norm1", self.norm1, nn.LayerNorm)
            or why_not_plain("attn.qkv", self.attn["qkv"], nn.Linear, bias=False)
            or why_not_plain("attn.proj", self.attn["proj"], nn.Linear)
            or why_not_plain("norm2", self.norm2, nn.LayerNorm)
            or why_not_plain("mlp.fc1", self.mlp["fc1"], nn.Linear)
            or why_not_plain("mlp.fc2", self.mlp["fc2"], nn.Linear)
        )

    def _call_submodules(self, x: Tensor, backend: str | None) -> Tensor:
        tokens = soft_split(x, **self.split, backend=backend)
        q, k, v = self.attn["qkv"](self.norm1(tokens)).chunk(3, dim=-1)
        y = token_attention(q, k, v, scale=self.scale, backend=backend)
        y = v + self.attn["proj"](y)
        return y + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(y))))


class TokenConvolution(nn.Conv2d):
    """A convolution instead of a layer, for comparison: (B, C, H, W) to (B, T, token_dim)."""

    def __init__(self, in_chans: int, token_dim: int, split: SoftSplit):
        super().__init__(in_chans, token_dim, **split)

    def calls(self) -> list[Call]:
        return []

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        return super().forward(x).flatten(2).transpose(1, 2)


LAYERS: dict[str, type[TokenPerformer | TokenTransformer | TokenConvolution]] = {
    "performer": TokenPerformer,
    "transformer": TokenTransformer,
    "convolution": TokenConvolution,
}


def check_images(x: Tensor, in_chans: int, like: Tensor) -> None:
    """Raise the errors of :meth:`T2TModule.forward`; ``like`` is one of the parameters."""
    if not isinstance(x, Tensor):
        raise InputError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 4 or x.shape[1] != in_chans or min(x.shape[2:]) < MIN_SIZE:
        raise InputError(
            f"x: got shape {tuple(x.shape)}, expected (B, {in_chans}, H, W) with H and W "
            f"at least {MIN_SIZE}"
        )
    if x.device != like.device:
        raise ValueError(f"x: got device {x.device}, the model is on {like.device}")
    if not x.is_floating_point() or (x.dtype != like.dtype and autocast_dtype(x) is None):
        raise TypeError(f"x: got {x.dtype}, the model is {like.dtype}; convert one of them")


class T2TModule(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, T, embed_dim); T is 196 at 224 × 224.

    Args:
        tokens_type: The first two layers: "performer", "transformer" or "convolution".
        in_chans: Channels of the image.
        embed_dim: Width of the returned tokens.
        token_dim: Width inside the layers.

    Any H, W ≥ 16 and any memory format are supported. The attribute ``backend`` is the backend of the
    kernels; None means the first available one.
    """

    def __init__(
        self,
        tokens_type: str = "performer",
        in_chans: int = 3,
        embed_dim: int = 384,
        token_dim: int = 64,
    ):
        super().__init__()
        if tokens_type not in LAYERS:
            raise InputError(f"tokens_type: {unknown_name('kind of layer', tokens_type, LAYERS)}")
        check_integer("in_chans", in_chans)
        check_integer("embed_dim", embed_dim)
        check_integer("token_dim", token_dim, least=2)
        layer = LAYERS[tokens_type]
        self.in_chans, self.token_dim, self.embed_dim = in_chans, token_dim, embed_dim
        self.backend: str | None = None
        self.attention1 = layer(in_chans, token_dim, SPLITS[0])
        self.attention2 = layer(token_dim, token_dim, SPLITS[1])
        # Applied to the third soft split, it is a 3 × 3 convolution of stride 2.
        self.project = nn.Linear(token_dim * SPLITS[2]["kernel_size"] ** 2, embed_dim)

    def set_fused_kernels(self, name: str) -> None:
        """Set the backend; "auto" for the first available one.

        Raises:
            InputError: The backend is unknown.
        """
        if name != "auto" and name not in BACKENDS:
            known = ("auto", *BACKENDS)
            raise InputError(f"fused_kernels: {unknown_name('backend', name, known)}")
        self.backend = None if name == "auto" else name

    def calls(self) -> dict[str, list[Call]]:
        """The operations of `t2t_kernels` that a forward calls, by submodule."""
        sizes = {
            "channels": self.token_dim,
            "kernel_size": SPLITS[2]["kernel_size"],
            "stride": SPLITS[2]["stride"],
            "outputs": self.embed_dim,
        }
        fused = why_not_plain("project", self.project, nn.Linear, bias=None) is None
        return {
            "attention1": self.attention1.calls(),
            "attention2": self.attention2.calls(),
            "project": [("soft_split_linear", sizes) if fused else ("soft_split", {})],
        }

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of the T = h·w tokens of an image of ``height`` × ``width``."""
        for split in SPLITS:
            height, width = output_size(height, width, **split)
        return height, width

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, embed_dim) of the images ``x``.

        Raises:
            InputError: ``x`` is not a tensor (B, in_chans, H, W) with H, W ≥ 16.
            TypeError, ValueError: Its dtype or device is not that of the parameters.
            BackendUnavailable: The named backend cannot run here.
        """
        reason = why_not_plain("project", self.project, nn.Linear, bias=None)
        like = next(self.parameters()) if reason else self.project.weight
        check_images(x, self.in_chans, like)
        # ONNX only supports plain operators.
        backend = "reference" if torch.onnx.is_in_onnx_export() else self.backend
        for layer, split in ((self.attention1, SPLITS[0]), (self.attention2, SPLITS[1])):
            grid = output_size(x.shape[2], x.shape[3], **split)
            # The tokens, viewed as (B, h, w, E), are a channels-last image for the next layer.
            x = layer(x, backend=backend).unflatten(1, grid).permute(0, 3, 1, 2)
        if reason is not None:
            announce(reason, backend)
            return self.project(soft_split(x, **SPLITS[2], backend=backend))
        return soft_split_linear(
            x, self.project.weight, self.project.bias, **SPLITS[2], backend=backend
        )
