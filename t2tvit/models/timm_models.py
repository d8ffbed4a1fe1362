"""Models of timm under the name ``timm:NAME``, built with the arguments of our own."""

from torch import nn

from t2tvit.errors import InputError, unknown_name

TIMM = "timm:"


def create_timm_model(
    name: str,
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **kw,
) -> nn.Module:
    """Build a model of timm with newly initialised weights.

    Args:
        name: ``timm:`` and a name that timm knows.
        img_size: an integer or (height, width); only models that are made for one size are told.
        num_classes: outputs of the head.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth.
        kw: further arguments of ``timm.create_model``.

    Raises:
        InputError: timm does not know the model, or the model does not take an argument.
    """
    import timm

    bare = name.removeprefix(TIMM)
    if not timm.is_model(bare):
        raise InputError(unknown_name("model of timm", bare, timm.list_models()))
    options = {"num_classes": num_classes, "in_chans": in_chans} | kw
    if getattr(timm.get_pretrained_cfg(bare), "fixed_input_size", False):
        options["img_size"] = img_size
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    try:
        return timm.create_model(bare, **options)
    except (AssertionError, TypeError, ValueError) as error:
        hint = "; it may lack stochastic depth: --drop-path 0" if drop_path_rate else ""
        raise InputError(f"model {name} with {options}: {error}{hint}") from None
