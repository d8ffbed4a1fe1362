"""The T2T module as a replacement of timm's ``PatchEmbed``: T2T tokens for timm's ViTs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from t2tvit.errors import InputError, unknown_name
from t2tvit.models.backbone import init_weights
from t2tvit.models.bounds import check_image_size
from t2tvit.models.t2t_module import T2TModule

# Pixels from one token to the next, as in a ViT with patches of size 16.
STRIDE = 16
FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


class T2TEmbed(nn.Module):
    """Images (B, in_chans, H, W) to tokens; a drop-in replacement of ``timm.layers.PatchEmbed``.

    ``timm.create_model("vit_tiny_patch16_224", embed_layer=t2tvit.T2TEmbed)`` is a ViT on T2T tokens:
    it has as many tokens at 224 × 224 as with patches of size 16, from overlapping soft splits with
    small attention layers between them (section 3.1 of the T2T-ViT paper). The parameters have the
    names of a T2T-ViT, under ``tokens_to_token``.

    timm's models of class ``VisionTransformer`` or ``VisionTransformerRelPos`` accept it as
    ``embed_layer``: ViT, DeiT, DeiT III, FlexiViT, DINOv2, CLIP, SigLIP and similar ones. Models with
    other patch sizes need ``patch_size=16``. SAM's encoders need
    ``functools.partial(T2TEmbed, output_fmt="NHWC")``. BeiT, EVA, RoPE ViTs and CaiT have no
    ``embed_layer``; if their patch size is 16, replace it afterwards:
    ``model.patch_embed = T2TEmbed(img_size, embed_dim=model.embed_dim)``, with
    ``output_fmt="NHWC"`` for DINOv3. XCiT, Swin V2, PiT, VOLO and MLP-Mixer are not supported.

    Args:
        img_size: An integer or (height, width), at least 16; None for any size.
        patch_size: 16, the distance between tokens.
        in_chans: Channels of the image.
        embed_dim: Width of the tokens.
        norm_layer: Called with ``embed_dim`` to create the norm of the tokens; None for no norm.
        flatten: Whether to return tokens (B, T, embed_dim) or a map (B, embed_dim, h, w).
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC", instead of ``flatten``.
        bias: Whether the last projection has a bias.
        strict_img_size: Whether to refuse images of another size than ``img_size``.
        dynamic_img_pad: Ignored: soft splits support any size from 16 without padding.
        tokens_type, token_dim: As in :class:`t2tvit.models.T2TModule`.
        fused_kernels: As in :func:`t2tvit.create_model`.
        device, dtype: Device and dtype of the parameters.

    Raises:
        InputError: An argument is invalid; in the forward, an image has another size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = STRIDE,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        *,
        tokens_type: str = "performer",
        token_dim: int = 64,
        fused_kernels: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if output_fmt is None:
            output_fmt = "NLC" if flatten else "NCHW"
        # timm passes enumeration members whose value is the name.
        self.output_fmt = getattr(output_fmt, "value", output_fmt)
        if self.output_fmt not in FORMATS:
            known = unknown_name("format", self.output_fmt, FORMATS)
            raise InputError(f"output_fmt: {known}")
        self.flatten = self.output_fmt == "NLC"
        self.strict_img_size = strict_img_size
        self.tokens_to_token = T2TModule(tokens_type, in_chans, embed_dim, token_dim)
        if not bias:
            self.tokens_to_token.project.register_parameter("bias", None)
        self.tokens_to_token.apply(init_weights)
        self.tokens_to_token.set_fused_kernels(fused_kernels)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()
        self.to(device=device, dtype=dtype)
        self.img_size: tuple[int, int] | None = None
        self.grid_size: tuple[int, int] | None = None
        self.num_patches: int | None = None
        self.set_input_size(img_size, patch_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Set the expected image size; None keeps the current one."""
        if patch_size not in (None, STRIDE, (STRIDE, STRIDE), [STRIDE, STRIDE]):
            raise InputError(
                f"patch_size: got {patch_size}, T2T tokens are {STRIDE} pixels apart; build the model "
                f"with patch_size={STRIDE}"
            )
        self.patch_size = (STRIDE, STRIDE)
        if img_size is not None:
            self.img_size = check_image_size(img_size)
            height, width = self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = height * width

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from one token to the next."""
        return STRIDE if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid (h, w) of the tokens of an image of ``img_size``."""
        return self.tokens_to_token.grid_size(*img_size)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        if self.strict_img_size and self.img_size is not None and size != self.img_size:
            raise InputError(
                f"x: got images of {size}, the model was built for {self.img_size}; call its "
                "set_input_size, or build it with dynamic_img_size=True"
            )
        x = self.norm(self.tokens_to_token(x))
        if self.output_fmt == "NLC":
            return x
        if self.output_fmt == "NCL":
            return x.transpose(1, 2)
        x = x.unflatten(1, self.dynamic_feat_size(size))
        return x if self.output_fmt == "NHWC" else x.permute(0, 3, 1, 2)
