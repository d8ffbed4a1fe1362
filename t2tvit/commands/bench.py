"""``t2tvit bench``: speed and memory of a model, compared with plain PyTorch and timm models."""

import argparse
from dataclasses import replace
from pathlib import Path

from t2tvit.commands.options import CONFIG_HELP, MODEL_KEYS, add_keys, given
from t2tvit.errors import InputError

HELP = "compare speed and memory with plain PyTorch"
EPILOG = """
examples:
  t2tvit bench --config digits
  t2tvit bench --model t2t_vit_14 --data synthetic --batch-size 32 --amp bfloat16 \\
      --against vit_small_patch16_224 deit_small_patch16_224 resnet50
"""
KEYS = ("data", "img_size", "workers", *MODEL_KEYS, "batch_size", "amp", "seed", "device")


def add_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", metavar="NAME", help=f"{CONFIG_HELP}; without it and --model, digits"
    )
    source.add_argument("--run", type=Path, metavar="DIR", help="the model of a training run")
    parser.add_argument(
        "--repetitions",
        type=int,
        default=10,
        metavar="N",
        help="repetitions of each measurement (default: 10)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=(),
        metavar="NAME",
        help="timm models to measure as well",
    )
    add_keys(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmark of the parsed arguments.

    Raises:
        InputError: Invalid input.
        BackendUnavailable: The named backend cannot run.
        RunError: Fused model and reference disagree, so nothing is timed.
    """
    from t2tvit.speed import LARGEST_BATCH, compare_with_reference, loader_line
    from t2tvit.training import distributed
    from t2tvit.training.checkpointing import BEST_FILE, read_about
    from t2tvit.training.config import from_dict, resolve

    if arguments.repetitions < 1:
        raise InputError(f"--repetitions: got {arguments.repetitions}, expected at least 1")
    overrides = given(arguments)
    num_classes = 1000
    if arguments.run is not None:
        about = read_about(arguments.run / BEST_FILE)
        if about is None:
            raise InputError(f"{arguments.run / BEST_FILE} does not name its model")
        config, num_classes = from_dict(about.config, overrides), about.create_args["num_classes"]
    else:
        config = resolve(
            arguments.config or (None if "model" in overrides else "digits"), overrides
        )
    if "batch_size" not in overrides:
        config = replace(config, batch_size=min(config.batch_size, LARGEST_BATCH))
    with distributed.joined(config.device) as world:
        if world.is_main:
            compare_with_reference(
                config, num_classes, arguments.repetitions, arguments.against, world
            )
            print(loader_line(config, world))
