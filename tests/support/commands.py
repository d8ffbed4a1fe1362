"""A weights file of a tiny model with its description, and the command line."""

from pathlib import Path

import torch

import t2tvit
from t2tvit.cli import main
from t2tvit.models import T2TBackbone
from t2tvit.training.checkpointing import Weights, save_weights

CLASS_NAMES = ["daisy", "poppy", "violet"]
ARGS = dict(img_size=[32, 48], num_classes=3, in_chans=3, embed_dim=32, depth=2, num_heads=2)
CONFIG = dict(
    model="t2t_vit_7",
    img_size=[32, 48],
    mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.25, 0.3],
    crop_pct=0.8,
    interpolation="bilinear",
    workers=0,
    device="cpu",
    amp="none",
)


def model(**options) -> T2TBackbone:
    """The model, with a head that distinguishes images."""
    torch.manual_seed(0)
    made = t2tvit.create_model("t2t_vit_7", **ARGS | options).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


def weights(folder: Path, class_names=CLASS_NAMES, **options) -> Path:
    """Its weights in a file in our format."""
    path = folder / "best.safetensors"
    about = Weights("t2t_vit_7", ARGS | options, list(class_names), CONFIG)
    save_weights(model(**options), path, about)
    return path


def run(capsys, *arguments, status: int = 0) -> str:
    """The standard output of a command; with another status, its one-line error."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == status, err
    if status:
        assert err.startswith("t2tvit: error: ") and err.count("\n") == 1, err
        return err
    return out
