"""The schema's keys as command-line options. Needs no extra package, so that --help never does."""

import argparse
from collections.abc import Iterable

from t2tvit.errors import InputError
from t2tvit.training.config import HINTS, KEYS, RunConfig, load_yaml

DEFAULTS = RunConfig()


def add_options(parser: argparse.ArgumentParser, names: Iterable[str] = KEYS) -> None:
    """One option per key of the schema; those not given stay absent from the namespace."""
    groups = {}
    for name in names:
        rules, hint = KEYS[name].metadata, HINTS[name]
        title = rules["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        default = getattr(DEFAULTS, name)
        shown = "none" if default is None else default
        if isinstance(default, tuple | dict):
            shown = " ".join(str(item) for item in default) or "none"
        options = {
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


def given(arguments: argparse.Namespace) -> dict[str, object]:
    """The schema's keys that were given on the command line, unconverted but for NAME=VALUE."""
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
