"""``t2tvit visualize``: what the layers of a model compute for images, as PNGs and a page."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from t2tvit.commands.options import PREPARED_KEYS, add_keys, add_weights, chosen_weights, given
from t2tvit.errors import InputError
from t2tvit.models.timm_models import TIMM

if TYPE_CHECKING:
    from t2tvit.training.distributed import World
    from t2tvit.visualization.subject import Subject

HELP = "show what the layers of a model compute for images"
EPILOG = """
Writes index.html and PNGs: feature maps of every layer, with dead and exploding channels marked and
counted (layers.json has the numbers); tokens of the soft splits; attention of the class token per
head and as a rollout; and for Performer layers the error of their random features relative to softmax.
--model accepts our models and timm:NAME. Without weights, the model is newly initialised.

examples:
  t2tvit visualize --run runs/digits --output pictures
  t2tvit visualize photo.jpg --checkpoint t2t_vit_14.safetensors --output pictures
  t2tvit visualize photo.jpg --model timm:resnet50 --pretrained --output pictures
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files or folders, or - for a list on standard input; the first 16 images are shown "
        "(default: four held-out images of --run; without --run, two photographs from scikit-learn)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder for page and pictures"
    )
    parser.add_argument(
        "--channels",
        type=int,
        default=64,
        metavar="N",
        help="channels to show per layer (default: 64)",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="for timm:NAME: download timm's weights"
    )
    add_weights(parser, required=False)
    add_keys(parser, PREPARED_KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the visualization of the parsed arguments.

    Raises:
        InputError: Invalid input.
        BackendUnavailable: The named kernels cannot run.
    """
    from t2tvit.training import distributed
    from t2tvit.visualization.subject import show

    if arguments.channels < 1:
        raise InputError(f"--channels: got {arguments.channels}, expected at least 1")
    options = given(arguments)
    with distributed.joined(options.get("device", "auto")) as world:
        subject = subject_of(arguments, options, world)
        show(subject, arguments.images, arguments.output, arguments.channels, world)


def subject_of(arguments: argparse.Namespace, options: dict, world: "World") -> "Subject":
    """The model to visualize, from the arguments and the configuration keys in ``options``."""
    from t2tvit.training.config import resolve
    from t2tvit.visualization.subject import new_subject, timm_subject, trained_subject

    if options.get("model", "").startswith(TIMM):
        if arguments.run is not None or arguments.config is not None:
            raise InputError(
                "--model timm:NAME: expected neither --run nor --config; --checkpoint or "
                "--pretrained gives its weights"
            )
        return timm_subject(options, arguments.checkpoint, arguments.pretrained)
    if arguments.pretrained:
        raise InputError(
            f"--pretrained: got our model, but only timm models have such weights; give --model {TIMM}NAME"
        )
    if arguments.run is not None or arguments.checkpoint is not None:
        held_out = arguments.run is not None and not arguments.images
        return trained_subject(*chosen_weights(arguments), world, held_out)
    if "model" in options or arguments.config is not None:
        return new_subject(resolve(arguments.config, options))
    raise InputError("got no model to visualize; give --run, --checkpoint or --model")
