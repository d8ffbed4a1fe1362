"""Options that several commands share: configuration keys, and which weights to use."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2tvit.errors import InputError
from t2tvit.training.config import GROUPS, HINTS, KEYS, RunConfig, load_yaml

if TYPE_CHECKING:
    from t2tvit.training.checkpointing import Weights

DEFAULTS = RunConfig()
MODEL_KEYS = ("model", "model_args", "num_classes", "fused_kernels")
# The preprocessing of images.
PREPARATION_KEYS = ("img_size", "interpolation", "crop_pct", "mean", "std")
PREPARED_KEYS = (*PREPARATION_KEYS, *MODEL_KEYS, "device")
INFERENCE_KEYS = (
    *("data", "img_size", "workers", "interpolation", "crop_pct", "mean", "std"),
    *(*MODEL_KEYS, "batch_size", "amp", "device"),
)
CONFIG_HELP = (
    "a YAML file, or a packaged config: digits, finetune/small, imagenet/MODEL, imagenet/finetune_384, "
    "transfer/cifar10, transfer/cifar100"
)


def add_keys(parser: argparse.ArgumentParser, names: Iterable[str] = KEYS) -> None:
    """Add an option per key of the schema. Options that are not given are absent from the namespace."""
    groups = {}
    for name in names:
        rules, hint = KEYS[name].metadata, HINTS[name]
        title = GROUPS[name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        default = getattr(DEFAULTS, name)
        shown = "none" if default is None else default
        if isinstance(default, tuple | dict):
            shown = " ".join(str(item) for item in default) or "none"
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": f"{rules['help']} (default: {shown})".replace("%", "%%"),
            "metavar": rules["metavar"] or _metavar(name, hint, rules["choices"]),
        }
        if hint is bool:
            del options["metavar"]
            options |= {"action": argparse.BooleanOptionalAction}
        elif hint is dict:
            options |= {"nargs": "+", "metavar": "NAME=VALUE"}
        elif "tuple" in str(hint):
            options |= {"nargs": "+"}
        if rules["bare"] is not None:
            options |= {"nargs": "?", "const": rules["bare"]}
        short = ("--init",) if name == "initial_checkpoint" else ()
        group.add_argument("--" + name.replace("_", "-"), *short, **options)
        if name == "fused_kernels":
            group.add_argument(
                "--no-fused-kernels",
                dest=name,
                action="store_const",
                const="reference",
                default=argparse.SUPPRESS,
                help="the same as --fused-kernels=reference: plain PyTorch",
            )


def _metavar(name: str, hint, choices) -> str:
    if choices is not None:
        return "{" + ",".join(choices) + "}"
    return "N" if "int" in str(hint) or "float" in str(hint) else name.upper()


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys that were given on the command line; only NAME=VALUE is converted."""
    overrides = {name: value for name, value in vars(arguments).items() if name in KEYS}
    if "model_args" in overrides:
        pairs = {}
        for item in overrides["model_args"]:
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise InputError(f"--model-args: got {item!r}, expected NAME=VALUE")
            try:
                pairs[name] = load_yaml(value)
            except ValueError:
                raise InputError(f"--model-args: {value!r:.80} of {name} is not YAML") from None
        overrides["model_args"] = pairs
    return overrides


def add_weights(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options that select trained weights."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--run",
        "--run-dir",  # torchrun interprets --run as an abbreviation of its own option
        type=Path,
        metavar="DIR",
        help="the output of a training run",
    )
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights, .safetensors or .pth(.tar), or local-dir:FOLDER or hf-hub:USER/NAME",
    )
    parser.add_argument(
        "--weights",
        choices=("best", "last"),
        default="best",
        help="which weights of --run: of the best or the last epoch (default: best)",
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"{CONFIG_HELP}; for weights that do not describe their model",
    )


def chosen_weights(arguments: argparse.Namespace) -> "tuple[Path, RunConfig, Weights | None]":
    """The file of --run or --checkpoint, its configuration and its own description.

    Raises:
        InputError: The file is missing or damaged, or does not fit the other options.
    """
    from t2tvit.training.inference import describe_checkpoint, weights_of

    path = arguments.checkpoint
    if path is None:
        path = weights_of(arguments.run, arguments.weights, f"--run {arguments.run}")
    return describe_checkpoint(path, given(arguments), arguments.config)
