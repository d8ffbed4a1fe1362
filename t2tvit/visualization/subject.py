"""The model and the images that ``t2tvit visualize`` shows."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from t2tvit.class_names import names_of
from t2tvit.data.images import MODES, describe_skipped, load_image
from t2tvit.data.sources import IMAGENET_STATISTICS
from t2tvit.errors import InputError, unknown_name
from t2tvit.models.timm_models import TIMM, check_timm_arguments
from t2tvit.prediction import HeldOutImages, gather
from t2tvit.terminal import printable
from t2tvit.training.checkpointing import Weights
from t2tvit.training.config import RunConfig, resolve
from t2tvit.training.distributed import World
from t2tvit.training.inference import load_trained
from t2tvit.training.model import build_model, load_weights
from t2tvit.training.pipeline import Normalize, eval_transform
from t2tvit.visualization.page import Page
from t2tvit.visualization.pages import visualize

# The number of held-out images, and the maximum number of given images on a page.
HELD_OUT_IMAGES, MOST_IMAGES = 4, 16


@dataclass(frozen=True)
class Subject:
    """A model to visualize, with its title, preprocessing and classes.

    ``held_out`` has the images to show if none are given.
    """

    model: nn.Module
    title: str
    config: RunConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: list[str] | None
    held_out: HeldOutImages | None = None


def trained_subject(
    path: Path, config: RunConfig, about: Weights | None, world: World, shows_held_out: bool
) -> Subject:
    """The model of a checkpoint; with ``shows_held_out``, also held-out images of its data."""
    trained = load_trained(path, config, about, world)
    names = names_of(trained.class_names, trained.model.num_classes)
    known, held_out = (values[: trained.channels] for values in IMAGENET_STATISTICS), None
    if shows_held_out:
        held_out = HeldOutImages(trained, HELD_OUT_IMAGES, names)
        known = held_out.mean, held_out.std
    mean, std = config.statistics(*known)
    return Subject(trained.model, f"{config.model}, {path}", config, mean, std, names, held_out)


def new_subject(config: RunConfig) -> Subject:
    """A model with new weights."""
    args = config.create_args(1000, 3)
    model = build_model(config.model, args, config.fused_kernels)
    mean, std = config.statistics(*IMAGENET_STATISTICS)
    return Subject(model, f"{config.model}, newly initialised", config, mean, std, None)


def timm_subject(options: dict, checkpoint: Path | None, pretrained: bool) -> Subject:
    """A timm model with timm's weights, those of a file, or new ones."""
    import timm

    name = options.pop("model").removeprefix(TIMM)
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"--model: {unknown_name('model of timm', name, timm.list_models())}")
    if checkpoint is not None and not checkpoint.is_file():
        raise InputError(f"--checkpoint: there is no file {checkpoint}")
    wanted = resolve(None, options)
    arguments_of_model = dict(wanted.model_args)
    check_timm_arguments(f"{TIMM}{name}", arguments_of_model)
    if "num_classes" in options:
        arguments_of_model["num_classes"] = wanted.num_classes
    if "img_size" in options and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        arguments_of_model["img_size"] = wanted.img_size
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments_of_model)
    # timm's models, loading and downloads raise many kinds of exceptions.
    except Exception as error:
        raise InputError(f"--model {TIMM}{name}: {type(error).__name__}: {error}") from None
    if checkpoint is not None:
        load_weights(model, checkpoint)
    data = timm.data.resolve_model_data_config(model)
    found = {
        "img_size": list(data["input_size"][1:]),
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
    }
    config = resolve(None, found | options)
    mean, std = config.statistics(data["mean"], data["std"])
    weights = "newly initialised"
    if pretrained or checkpoint:
        weights = str(checkpoint or "timm's weights")
    names = names_of(None, model.num_classes) if pretrained else None
    return Subject(model, f"{TIMM}{name}, {weights}", config, mean, std, names)


def show(
    subject: Subject, images: Sequence[Path], folder: Path, channels: int, world: World
) -> None:
    """Write the page of a model and ``images``; :func:`open_images` chooses the default."""
    pictures = open_images(images, subject)
    transform = eval_transform(subject.config)
    pixels = torch.stack([transform(picture) for _, picture in pictures])
    normalize = Normalize(subject.mean, subject.std, world.device)
    visualize(
        subject.model.to(world.device).eval(),
        normalize(pixels),
        [(name, to_picture(image)) for (name, _), image in zip(pictures, pixels)],
        Page(folder, subject.title),
        class_names=subject.class_names,
        channels=channels,
    )


def open_images(given: Sequence[Path], subject: Subject) -> list[tuple[str, Image.Image]]:
    """Images with their names: given files and those in folders, or held-out images of the run.

    The default is two photographs from scikit-learn.
    """
    channels = len(subject.mean)
    if channels not in MODES:
        raise InputError(f"visualize reads grey or colour images, not {channels} channels")
    if given:
        paths, skipped = gather(given)
        if skipped:
            print(printable(describe_skipped(skipped)), file=sys.stderr)
        if len(paths) > MOST_IMAGES:
            print(f"showing the first {MOST_IMAGES} of {len(paths):,} images")
        return [(path.name, load_image(path, MODES[channels])) for path in paths[:MOST_IMAGES]]
    if subject.held_out is not None:
        images = subject.held_out
        return [(images.caption(index), images.image(index)) for index in range(len(images))]
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    return [
        (Path(name).name, Image.fromarray(pixels).convert(MODES[channels]))
        for name, pixels in zip(samples.filenames, samples.images)
    ]


def to_picture(pixels: Tensor) -> Image.Image:
    """A preprocessed uint8 image (C, H, W) as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
