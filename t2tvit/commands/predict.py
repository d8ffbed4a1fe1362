"""``t2tvit predict``: classifies image files, folders and lists, or held-out images."""

import argparse
from pathlib import Path

from t2tvit.commands.options import INFERENCE_KEYS, add_keys, add_weights, chosen_weights
from t2tvit.errors import InputError

HELP = "classify images, or a sample of the held-out images"
EPILOG = """
Held-out images are identified by path (imagefolder), SHARD/KEY (webdataset) or index. The plot is
written in the format of its extension and shows the first --images images.

examples:
  t2tvit predict --run runs/digits --plot predictions.png
  t2tvit predict --run runs/flowers photo.jpg folder --top-k 3
  find folder -name '*.jpg' | t2tvit predict --run runs/flowers --json - > predictions.jsonl
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files or folders, or - for a list on standard input, one per line",
    )
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="how many classes to print (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="the class names, one per line, for weights without names; a 1000-class checkpoint "
        "without class names is assumed to be ImageNet",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the images with the predicted classes; the default extension is .png",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=40,
        metavar="N",
        help="how many images to draw, and without IMAGE how many held-out images to use (default: "
        "40)",
    )
    add_weights(parser)
    add_keys(parser, INFERENCE_KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the prediction of the parsed arguments.

    Raises:
        InputError: Invalid input. For unreadable images, it is raised after all others are classified.
        BackendUnavailable: The named backend cannot run.
    """
    from t2tvit.class_names import names_of, read_names
    from t2tvit.figures import figure_file
    from t2tvit.prediction import Output, predict, source_of
    from t2tvit.training import distributed
    from t2tvit.training.inference import load_trained

    for name in ("top_k", "images"):
        if getattr(arguments, name) < 1:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option}: got {getattr(arguments, name)}, expected at least 1")
    plot = None if arguments.plot is None else figure_file(arguments.plot, "--plot")
    path, config, about = chosen_weights(arguments)
    with distributed.joined(config.device) as world:
        trained = load_trained(path, config, about, world)
        if not world.is_main:
            return
        if arguments.class_names is not None:
            names = read_names(arguments.class_names, trained.model.num_classes)
        else:
            names = names_of(trained.class_names, trained.model.num_classes)
        source = source_of(trained, arguments.files, arguments.images, names)
        output = Output(arguments.top_k, arguments.json, plot, arguments.images)
        predict(trained, source, names, output, f"{config.model}, {path}")
