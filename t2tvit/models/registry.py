"""The published models and the paper's baselines: configurations, published figures, `create_model`."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2tvit.errors import InputError, unknown_name
from t2tvit.models.backbone import T2TBackbone, T2TVisionTransformer
from t2tvit.models.bounds import check_bounds
from t2tvit.models.variants import (
    GhostAttention,
    GhostMlp,
    SEAttention,
    T2TDenseVisionTransformer,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """A published model, or a baseline.

    Attributes:
        architecture: The class.
        options: The keyword arguments of this model.
        params: Number of parameters, including frozen ones, with 1000 classes.
        gmacs: Published 10⁹ multiply-adds of a forward at 224 × 224; None if unpublished.
        top1: Published ImageNet-1k top-1 accuracy in percent; None if unpublished.
        top1_384: The same after fine-tuning at 384 × 384.
    """

    architecture: type[T2TBackbone]
    options: Mapping[str, Any]
    params: int
    gmacs: float | None = None
    top1: float | None = None
    top1_384: float | None = None


def _t2t_vit(
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    *,
    params: int,
    gmacs: float | None = None,
    top1: float | None = None,
    top1_384: float | None = None,
    **options,
) -> ModelConfig:
    options |= dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
    return ModelConfig(T2TVisionTransformer, options, params, gmacs, top1, top1_384)


def _vit(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, **config) -> ModelConfig:
    return _t2t_vit(embed_dim, depth, num_heads, mlp_ratio, tokens_type="patch", **config)


MODELS: dict[str, ModelConfig] = {
    # Performer layers in the T2T module (tables 2 and 3 of the paper).
    "t2t_vit_7": _t2t_vit(256, 7, 4, 2, params=4_310_222, gmacs=1.1, top1=71.7),
    "t2t_vit_10": _t2t_vit(256, 10, 4, 2, params=5_889_230, gmacs=1.5, top1=75.2),
    "t2t_vit_12": _t2t_vit(256, 12, 4, 2, params=6_941_902, gmacs=1.8, top1=76.5),
    "t2t_vit_14": _t2t_vit(384, 14, 6, 3, params=21_545_550, gmacs=4.8, top1=81.5, top1_384=83.3),
    "t2t_vit_19": _t2t_vit(448, 19, 7, 3, params=39_177_422, gmacs=8.5, top1=81.9),
    "t2t_vit_24": _t2t_vit(512, 24, 8, 3, params=64_105_934, gmacs=13.8, top1=82.3),
    # Softmax attention in the T2T module.
    "t2t_vit_t_14": _t2t_vit(
        384, 14, 6, 3, params=21_541_070, gmacs=6.1, top1=81.7, tokens_type="transformer"
    ),
    "t2t_vit_t_19": _t2t_vit(
        448, 19, 7, 3, params=39_172_942, gmacs=9.8, top1=82.4, tokens_type="transformer"
    ),
    "t2t_vit_t_24": _t2t_vit(
        512, 24, 8, 3, params=64_101_454, gmacs=15.0, top1=82.6, tokens_type="transformer"
    ),
    # From CNN to ViT.
    "t2t_vit_14_resnext": _t2t_vit(384, 14, 32, 3, params=21_545_550, gmacs=4.8),
    "t2t_vit_14_wide": _t2t_vit(768, 4, 12, 3, params=25_156_302, gmacs=5.2),
    "t2t_vit_14_se": _t2t_vit(
        384, 14, 6, 3, params=21_803_598, gmacs=4.8, attention_layer=SEAttention
    ),
    "t2t_vit_16_ghost": _t2t_vit(
        384,
        16,
        6,
        3,
        params=16_253_262,
        gmacs=3.8,
        attention_layer=GhostAttention,
        mlp_layer=GhostMlp,
    ),
    "t2t_vit_dense": ModelConfig(T2TDenseVisionTransformer, {}, params=23_647_062, gmacs=5.3),
}

# ViT and its variants, for comparison: the same blocks on 16 × 16 patches. The sizes of the wide and
# dense variants are not published.
BASELINES: dict[str, ModelConfig] = {
    "vit_s_16": _vit(768, 8, 8, 3, params=48_754_408, gmacs=10.1, top1=78.1),
    "vit_b_16": _vit(768, 12, 12, 4, params=86_540_008),
    "vit_s_16_resnext": _vit(768, 8, 32, 3, params=48_754_408),
    "vit_s_16_se": _vit(768, 8, 8, 3, params=49_344_232, attention_layer=SEAttention),
    "vit_s_16_ghost": _vit(
        768, 8, 8, 3, params=32_248_552, attention_layer=GhostAttention, mlp_layer=GhostMlp
    ),
    "vit_wide": _vit(1024, 4, 16, 3, params=43_997_160),
    "vit_deep_narrow": _vit(384, 16, 6, 3, params=24_405_352),
    "vit_dense": ModelConfig(
        T2TDenseVisionTransformer, {"tokens_type": "patch"}, params=23_501_680
    ),
}


def list_models(baselines: bool = False) -> list[str]:
    """The names of the published T2T-ViTs; with ``baselines`` also those of the paper's ViTs."""
    return [*MODELS, *(BASELINES if baselines else ())]


def create_model(
    name: str,
    *,
    fused_kernels: str = "auto",
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **kw,
) -> T2TBackbone:
    """Build a model with newly initialised weights.

    Args:
        name: One of :func:`list_models`, including baselines.
        fused_kernels: Backend of the T2T module: "auto", "reference", "cpu", "triton" or "cuda".
        img_size: The usual image size, an integer or (height, width), at least 16. For other sizes,
            the position embedding is resized.
        num_classes: Outputs of the head; 0 for no head.
        in_chans: Channels of the image.
        drop_path_rate: Stochastic depth of the last block.
        kw: Changes to the published configuration: tokens_type, token_dim, embed_dim, depth,
            num_heads, mlp_ratio, qk_scale, drop_rate, attn_drop_rate, attention_layer, mlp_layer; for
            the dense models, stages and growth_rate instead of depth and the layers.

    Returns:
        The model in training mode, float32. Its ``pretrained_cfg`` is timm's description of the
        preprocessing, and ``create_args`` are the arguments to build it again.

    Raises:
        InputError: A name or option is unknown or invalid.
    """
    known_models = MODELS | BASELINES
    if not isinstance(name, str) or name not in known_models:
        raise InputError(unknown_name("model", name, known_models))
    config = known_models[name]
    known = _options(config.architecture)
    for option in kw:
        if option not in known:
            raise InputError(unknown_name(f"option of {name}", option, known))
    args = dict(
        img_size=img_size,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
        **kw,
    )
    check_bounds(args)
    model = config.architecture(fused_kernels=fused_kernels, **{**config.options, **args})
    model.create_args = args
    model.pretrained_cfg = pretrained_cfg(name, model.img_size, num_classes, in_chans)
    model.default_cfg = model.pretrained_cfg
    return model


def _options(architecture: type[T2TBackbone]) -> list[str]:
    """The keyword arguments of a model class and its bases."""
    names = (
        parameter.name
        for cls in architecture.__mro__
        if issubclass(cls, T2TBackbone)
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    )
    return list(dict.fromkeys(names))


def pretrained_cfg(
    name: str, img_size: tuple[int, int] = (224, 224), num_classes: int = 1000, in_chans: int = 3
) -> dict[str, Any]:
    """The published preprocessing in the format of timm's ``pretrained_cfg``.

    The evaluation crop is 0.9 of the image, and the whole image from 384 pixels on. Without 3
    channels, each channel gets the mean of ImageNet's statistics.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if in_chans != 3:
        mean, std = (in_chans * (sum(statistic) / 3,) for statistic in (mean, std))
    return {
        "architecture": name,
        "input_size": (in_chans, *img_size),
        "num_classes": num_classes,
        "crop_pct": 0.9 if min(img_size) < 384 else 1.0,
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "fixed_input_size": False,
        "first_conv": None,
        "classifier": "head",
    }
