"""``t2tvit visualize``: what the layers of a model make of images, as PNGs and one page."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from t2tvit.commands.options import PREPARED_KEYS, add_keys, add_weights, chosen_weights, given
from t2tvit.errors import InputError
from t2tvit.models.timm_models import TIMM

if TYPE_CHECKING:
    from t2tvit.training.distributed import World
    from t2tvit.visualization.subject import Subject

HELP = "show what a model's layers make of images"
EPILOG = """
Writes index.html with PNGs beside it: feature maps of every layer with dead and exploding channels
marked and counted (layers.json has the numbers), tokens of the soft splits, attention of the class
token by head and as rollout, and for Performer layers how close their random features are to softmax.
--model takes one of ours or timm:NAME; without weights it is newly initialised.

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
        help="image files, folders of them, or - for a list on standard input, of which the first "
        "16 are shown (default: four held-out images of --run; without --run the two photographs "
        "that scikit-learn ships)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of page and pictures"
    )
    parser.add_argument(
        "--channels", type=int, default=64, metavar="N", help="to show of a layer (default: 64)"
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="of timm:NAME: with timm's weights, downloaded"
    )
    add_weights(parser, required=False)
    add_keys(parser, PREPARED_KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Visualize as the parsed arguments say.

    Raises:
        InputError: something the user can fix.
        BackendUnavailable: the kernels asked for cannot run.
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
    """The model to visualize, as the arguments and the configuration keys in ``options`` say."""
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
        raise InputError(f"--pretrained: only a model of timm has such weights; give {TIMM}NAME")
    if arguments.run is not None or arguments.checkpoint is not None:
        held_out = arguments.run is not None and not arguments.images
        return trained_subject(*chosen_weights(arguments), world, held_out)
    if "model" in options or arguments.config is not None:
        return new_subject(resolve(arguments.config, options))
    raise InputError("what to visualize? give --run, --checkpoint or --model")
