"""Registers the models with timm, so that ``timm.create_model("t2t_vit_14")`` works.

Importing this module registers them, and needs timm.
"""

from timm.models import generate_default_cfgs, register_model

from t2tvit import hub
from t2tvit.errors import InputError
from t2tvit.models.registry import MODELS, create_model, pretrained_cfg

default_cfgs = generate_default_cfgs({name: pretrained_cfg(name) for name in MODELS})


def _entrypoint(name: str):
    def build(
        pretrained: bool = False,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        cache_dir=None,
        **kwargs,
    ):
        kwargs.pop(
            "pretrained_model_args", None
        )  # timm passes the same values as other arguments, too
        source = _address(pretrained_cfg) if pretrained else None
        if pretrained and source is None:
            raise InputError(
                f"pretrained: no weights of {name} can be downloaded; build it with "
                f"pretrained=False and load a file with t2tvit.load_checkpoint(model, path)"
            )
        model = create_model(name, **kwargs) if source is None else hub.load(source, **kwargs)
        model.pretrained_cfg.update(pretrained_cfg_overlay or {})
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name} with newly initialised weights; see t2tvit.create_model."
    return build


def _address(pretrained_cfg) -> str | None:
    """The address of weights that timm found in a folder or on the Hub, if any."""
    if not isinstance(pretrained_cfg, dict):
        return None
    if pretrained_cfg.get("source") == "local-dir":
        return hub.LOCAL + pretrained_cfg["file"]
    if pretrained_cfg.get("source") == "hf-hub":
        return hub.HUB + pretrained_cfg["hf_hub_id"]
    return None


for _name in MODELS:
    globals()[_name] = register_model(_entrypoint(_name))
