"""Loading trained models."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from t2tvit import hub
from t2tvit.data.sources import Split, open_split
from t2tvit.errors import InputError
from t2tvit.models.registry import pretrained_cfg
from t2tvit.training.checkpointing import BEST_FILE, LAST_FILE, Weights, read_about
from t2tvit.training.config import RunConfig, from_dict, resolve
from t2tvit.training.distributed import World
from t2tvit.training.model import build_model, check_classes, load_weights, try_forward

# Keys that our checkpoints set.
DECIDED_KEYS = ("model", "model_args", "num_classes")


@dataclass(frozen=True)
class Trained:
    """A model with its weights; ``class_names`` is None if the checkpoint does not name them."""

    model: nn.Module
    config: RunConfig
    class_names: list[str] | None
    channels: int


def weights_of(run: Path, which: str, source: str) -> Path:
    """The file of the ``best`` or ``last`` weights of a run."""
    path = run / {"best": BEST_FILE, "last": LAST_FILE}[which]
    if not path.is_file():
        raise InputError(f"{source}: there is no {path.name}; has an epoch ended?")
    return path


def describe_checkpoint(
    path: Path, overrides: dict, config: str | None = None
) -> tuple[Path, RunConfig, Weights | None]:
    """The file of a checkpoint, the configuration for its use, and its own description.

    Our checkpoints, ``local-dir:`` and ``hf-hub:`` describe the model and the preprocessing of images.
    For others, ``overrides`` or ``config`` (a packaged name or YAML file) must describe them.
    """
    if hub.is_address(str(path)):
        path, about = described_at(str(path))
    else:
        about = read_about(path)
    if about is None:
        if config is None and "model" not in overrides:
            raise InputError(f"{path} does not name its model; give --model or --config")
        return path, resolve(config, overrides), None
    for key in DECIDED_KEYS:
        if key in overrides:
            raise InputError(
                f"--{key.replace('_', '-')}: {path} itself says that it is {about.model}; remove the option"
            )
    return path, from_dict(about.config, overrides, str(path)), about


def described_at(address: str) -> tuple[Path, Weights]:
    """The file of the weights at a :mod:`t2tvit.hub` address, and its description of them."""
    stored = hub.read(address)
    args = stored.args
    cfg = pretrained_cfg(stored.name, stored.size, args["num_classes"], args["in_chans"])
    cfg |= stored.pretrained_cfg
    config = {"model": stored.name, "img_size": list(stored.size)}
    config |= {key: cfg[key] for key in ("interpolation", "crop_pct")}
    config |= {key: list(cfg[key]) for key in ("mean", "std")}
    return stored.weights, Weights(stored.name, args, stored.class_names, config)


def load_trained(path: Path, config: RunConfig, about: Weights | None, world: World) -> Trained:
    """The model of a checkpoint, in evaluation mode on this process's device."""
    if about is None:
        args, class_names = config.create_args(1000, 3), None
    else:
        args, class_names = {"in_chans": 3} | about.create_args, about.class_names
    model = build_model(config.model, args, config.fused_kernels)
    load_weights(model, path, new_head=False)
    model.to(world.device)
    try_forward(model, config, args["in_chans"], world.device)
    return Trained(model, config, class_names, args["in_chans"])


def held_out(trained: Trained) -> tuple[Split, list[int] | None]:
    """The held-out split of the configured data, and the model's number of each label."""
    config = trained.config
    classes = trained.model.num_classes
    split = open_split(config.data, "val", img_size=config.size, num_classes=classes)
    if split.channels != trained.channels:
        raise InputError(
            f"data: {config.data} has {split.channels} channels, the model takes {trained.channels}"
        )
    check_classes(classes, split)
    if trained.class_names is None and len(split.class_names) != classes:
        raise InputError(
            f"data: {config.data} has {len(split.class_names)} classes, the model {classes}, and "
            "its checkpoint does not name them; give data with the same classes"
        )
    if trained.class_names is None or trained.class_names == split.class_names:
        return split, None
    order = {name: index for index, name in enumerate(trained.class_names)}
    unknown = [name for name in split.class_names if name not in order]
    if unknown:
        raise InputError(
            f"data: {config.data} has classes that the model was not trained on: "
            f"{', '.join(unknown[:5])}"
        )
    return split, [order[name] for name in split.class_names]
