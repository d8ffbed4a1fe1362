"""``t2tvit compare``: trains several models with the same budget; writes a table and plots."""

import argparse
from pathlib import Path

from t2tvit.commands.options import add_keys, given
from t2tvit.errors import InputError
from t2tvit.training.config import KEYS

HELP = "train several models in the same way and compare them"
EPILOG = """
All models have the same data, epochs, batches, optimiser and seeds. A comparison's file lists the
models, each with its model, model_args and drop_path. To resume a stopped comparison, repeat its
command.

examples:
  t2tvit compare --output runs/compare
  t2tvit compare t2t_vit_7 vit_s_16 timm:resnet18 --data cifar10 --img-size 32 --output runs/cifar10
  t2tvit compare --config mine.yaml --seeds 0 1 2 3 4 --epochs 100 --output runs/mine
"""
# Keys that a comparison sets for each model or run.
OWN_KEYS = ("model", "model_args", "seed", "initial_checkpoint")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="NAME",
        help="whole models that `t2tvit models` lists, or timm:NAME; or use --config",
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="a YAML file of a training configuration with models and seeds, or the packaged "
        "digits (the default without NAME)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the folder for all output: a folder per run, the table, plots and CSV files",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="seeds of the runs of each model (default: 0 1 2)",
    )
    add_keys(parser, [name for name in KEYS if name not in OWN_KEYS])


def run(arguments: argparse.Namespace) -> None:
    """Run the comparison of the parsed arguments.

    Raises:
        InputError: Invalid input.
    """
    from t2tvit.comparison.plan import claim, read_comparison
    from t2tvit.comparison.results import report
    from t2tvit.comparison.runs import cost, train_all
    from t2tvit.training import distributed
    from t2tvit.training.stopping import Stopped

    output = arguments.output
    if output is None:
        raise InputError("--output: got none, expected a folder for the comparison's files")
    comparison = read_comparison(
        arguments.config, arguments.models, arguments.seeds, given(arguments)
    )
    with distributed.joined(comparison.shared.device) as world:
        try:
            costs = {name: cost(config, world) for name, config in comparison.models.items()}
            world.on_main(lambda: claim(comparison, output))
            train_all(comparison, output, world)
            if world.is_main:
                report(comparison, costs, output, world)
        except Stopped as stopped:
            world.say(f"stopped by a signal; repeat the command to resume from {output}")
            stopped.end_elsewhere()
