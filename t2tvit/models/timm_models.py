"""timm's models under the name ``timm:NAME``, built with the same arguments as our models."""

from collections.abc import Mapping

from torch import nn

from t2tvit.errors import InputError, unknown_name
from t2tvit.models.bounds import check_bounds

TIMM = "timm:"
# Arguments of timm's models that shape a network. All others could download or read other files.
TIMM_ARGUMENTS = {
    *("img_size", "num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_block_rate"),
    *("attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate", "mlp_drop_rate"),
    *("embed_dim", "embed_dims", "dim", "dims", "depth", "depths", "num_heads", "num_stages"),
    *("mlp_ratio", "mlp_ratios", "qkv_bias", "qk_norm", "qk_scale", "init_values", "growth_rate"),
    *("patch_size", "window_size", "window_ratio", "head_dim", "attn_head_dim", "rel_pos_dim"),
    *("global_pool", "class_token", "no_embed_class", "reg_tokens", "pos_embed", "fc_norm"),
    *("pre_norm", "final_norm", "use_fc_norm", "dynamic_img_size", "dynamic_img_pad"),
    *("strict_img_size", "always_partition", "act_layer", "norm_layer", "head_init_scale"),
    *("layers", "channels", "block_size", "base_width", "cardinality", "bottle_ratio"),
    *("block_reduce_first", "stem_type", "stem_width", "avg_down", "replace_stem_pool"),
    *("output_stride", "kernel_size", "kernel_sizes", "ls_init_value", "conv_mlp", "conv_bias"),
    *("use_grn", "head_hidden_size", "stem_size", "fix_stem", "channel_multiplier", "pad_type"),
    *("depth_multiplier", "width", "memory_efficient", "zero_init_last", "weight_init"),
}


def check_timm_arguments(name: str, args: Mapping[str, object]) -> None:
    """Raise an InputError unless ``args`` only shape a network, with bounded values."""
    for key in args:
        if key not in TIMM_ARGUMENTS:
            raise InputError(
                f"model {name}: the argument {str(key)[:80]!r} does not shape the network; remove it, "
                "and give weights as --init FILE"
            )
    check_bounds(args)


def create_timm_model(
    name: str,
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **kw,
) -> nn.Module:
    """Build a timm model with newly initialised weights.

    Args:
        name: ``timm:`` and a name of timm.
        img_size: An integer or (height, width); passed only to models with a fixed input size.
        num_classes: Outputs of the head.
        in_chans: Channels of the image.
        drop_path_rate: Stochastic depth.
        kw: Further arguments of ``timm.create_model``; those in TIMM_ARGUMENTS are allowed.

    Raises:
        InputError: timm does not know the model, or the model does not support an argument.
    """
    import timm

    bare = name.removeprefix(TIMM)
    if not timm.is_model(bare):
        raise InputError(unknown_name("model of timm", bare, timm.list_models()))
    check_timm_arguments(name, kw)
    check_bounds({"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans})
    options = {"num_classes": num_classes, "in_chans": in_chans} | kw
    if getattr(timm.get_pretrained_cfg(bare), "fixed_input_size", False):
        options["img_size"] = img_size
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    try:
        return timm.create_model(bare, **options)
    # The errors of timm and PyTorch for invalid arguments have no narrower base.
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = "; it may lack stochastic depth: --drop-path 0" if drop_path_rate else ""
        raise InputError(f"model {name} with {options}: {reason}{hint}") from None
