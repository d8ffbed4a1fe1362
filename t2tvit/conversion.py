"""Reading, describing and writing weights in our format, the published format and on the Hub."""

import math
from io import BytesIO
from pathlib import Path

import torch

from t2tvit import hub
from t2tvit.class_names import names_of
from t2tvit.errors import InputError
from t2tvit.files import write_atomically
from t2tvit.models import T2TBackbone, load_checkpoint
from t2tvit.models.checkpoint import read_state_dict
from t2tvit.training.checkpointing import Weights, read_about, save_weights
from t2tvit.training.config import resolve
from t2tvit.training.model import build_model

PREPARATION = ("interpolation", "crop_pct", "mean", "std")
OURS, PUBLISHED = ".safetensors", (".pth", ".pth.tar", ".pt")


def read(source: str, options: dict) -> tuple[T2TBackbone, Weights]:
    """The model of ``source`` with its weights, and its description."""
    if hub.is_address(source):
        refuse(options, source)
        model = hub.load(source)
        return model, described(model)
    path = Path(source)
    about = read_about(path)
    if about is not None:
        refuse(options, source)
        model = build_model(about.model, about.create_args, "auto")
        if not isinstance(model, T2TBackbone):
            raise InputError(
                f"{path} is of {about.model}; only models of this package are converted"
            )
        load_checkpoint(model, path)
        return model, about
    if "model" not in options:
        raise InputError(f"{path} does not name its model; give --model")
    _, state = read_state_dict(path, warn=False)
    config = resolve(None, sizes(state) | options)
    has_head = any(name.startswith("head.") for name in state)
    if not has_head and "num_classes" in options:
        raise InputError(f"--num-classes: {path} has no head; remove the option")
    classes = 1000 if has_head else 0
    model = build_model(config.model, config.create_args(classes, channels(state)), "auto")
    load_checkpoint(model, path, new_head=False)
    for key in PREPARATION:
        if key in options:
            model.pretrained_cfg[key] = getattr(config, key)
    return model, described(model)


def refuse(options: dict, source: str) -> None:
    for name in options:
        option = "--" + name.replace("_", "-")
        raise InputError(f"{option}: {source} itself says what it is; remove the option")


def sizes(state: dict) -> dict:
    """The image size and number of classes of published weights."""
    found = {}
    if "head.weight" in state:
        found["num_classes"] = len(state["head.weight"])
    if "pos_embed" in state:
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        found["img_size"] = 16 * grid
    return found


def channels(state: dict) -> int:
    """Channels of the images, derived from the first layer: a norm of 7×7 patches, or a convolution."""
    norm = state.get("tokens_to_token.attention1.norm1.weight")
    if norm is not None:
        return max(1, len(norm) // 49)
    stem = (state.get(f"tokens_to_token.{name}.weight") for name in ("attention1", "proj"))
    return next((weight.shape[1] for weight in stem if weight is not None), 3)


def described(model: T2TBackbone) -> Weights:
    """The description of a model, from its ``pretrained_cfg``."""
    cfg = model.pretrained_cfg
    args = model.create_args | {"img_size": list(model.img_size), "num_classes": model.num_classes}
    config = {
        "model": cfg["architecture"],
        "img_size": list(model.img_size),
        "interpolation": cfg["interpolation"],
        "crop_pct": cfg["crop_pct"],
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
    }
    names = names_of(cfg.get("label_names"), model.num_classes)
    return Weights(cfg["architecture"], args, names, config)


def write(model: T2TBackbone, about: Weights, target: str) -> None:
    if hub.is_address(target):
        model.pretrained_cfg.update({key: about.config[key] for key in PREPARATION})
        hub.push(model, target, class_names=about.class_names)
    elif target.endswith(OURS):
        save_weights(model, Path(target), about)
    else:
        state = model.state_dict()
        # Both names, because the published evaluation uses either; the tensors are stored once.
        content = {"arch": about.model, "state_dict": state, "state_dict_ema": state}
        # In memory first: torch.save to a file aborts the process if the disk is full.
        buffer = BytesIO()
        torch.save(content, buffer)
        write_atomically(Path(target), buffer.getbuffer())
