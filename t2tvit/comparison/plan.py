"""The plan of a comparison: models, shared budget and seeds, from a file or the command line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from t2tvit.errors import InputError, unknown_name
from t2tvit.files import read_text, write_atomically
from t2tvit.training.config import RunConfig, convert, from_dict, load_yaml, read_yaml

PACKAGED = Path(__file__).parent
# Keys that may differ between the models. All others are the shared budget.
MODEL_KEYS = ("model", "model_args", "drop_path")
# Keys that may change when a comparison is resumed, besides additional models and seeds. None of them
# changes a result.
MAY_CHANGE = {
    *("workers", "device", "fused_kernels", "checkpoint_minutes", "keep_checkpoints", "profile"),
    *("tensorboard", "wandb"),
}
CONFIG_FILE = "comparison.yaml"


@dataclass(frozen=True)
class Comparison:
    """A configuration per name, which differ only in MODEL_KEYS, and seeds."""

    shared: RunConfig
    models: dict[str, RunConfig]
    seeds: tuple[int, ...]

    def runs(self) -> list[tuple[str, int]]:
        """The runs, ordered by seed, so that all models have a run early."""
        return [(name, seed) for seed in self.seeds for name in self.models]


def read_comparison(
    config: str | None, names: Sequence[str], seeds: Sequence[int] | None, overrides: dict
) -> Comparison:
    """A comparison from a file or packaged name, or of the unchanged models ``names``.

    Raises:
        InputError: A key is unknown, a model sets a key of the budget, or there are no models.
    """
    if config is None and not names:
        config = "digits"
    path = config
    if config is not None and (PACKAGED / f"{config}.yaml").is_file():
        path = PACKAGED / f"{config}.yaml"
    values = read_yaml(path) if path is not None else {}
    listed = values.pop("models", {})
    listed_seeds = values.pop("seeds", [0, 1, 2])
    if names:
        listed = {name: {"model": name} for name in names}
    if not isinstance(listed, Mapping) or not listed:
        raise InputError(f"config {config}: models: got {listed!r}, expected a name for each model")
    shared = from_dict(values, overrides, str(config))
    models = {}
    for name, keys in listed.items():
        source = f"config {config}: models: {name}"
        if not isinstance(keys, Mapping) or "model" not in keys:
            raise InputError(f"{source}: got {keys!r}, expected keys including model")
        for key in keys:
            if key not in MODEL_KEYS:
                raise InputError(f"{source}: {unknown_name('key', str(key), MODEL_KEYS)}")
        own: dict[str, Any] = {
            key: convert(key, value, f"{source}: {key}") for key, value in keys.items()
        }
        models[str(name)] = replace(shared, **({"model_args": {}} | own))
    if len({folder_of(name) for name in models}) < len(models):
        raise InputError(f"config {config}: models: two names differ only in punctuation")
    return Comparison(shared, models, checked_seeds(seeds or listed_seeds))


def checked_seeds(seeds: object) -> tuple[int, ...]:
    if not isinstance(seeds, Sequence) or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds: got {seeds!r}, expected different whole numbers")
    return tuple(convert("seed", seed, "seeds") for seed in seeds)


def folder_of(name: str) -> str:
    """The folder name of a model."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def place_of(output: Path, name: str, seed: int) -> Path:
    return output / folder_of(name) / f"seed-{seed}"


def claim(comparison: Comparison, output: Path) -> None:
    """Record the comparison in ``output``, which may hold a part of the same comparison.

    Raises:
        InputError: ``output`` holds another comparison, or is not a folder.
    """
    values = yaml.safe_load(comparison.shared.to_yaml())
    for key in (*MODEL_KEYS, "seed"):
        del values[key]
    values["seeds"] = list(comparison.seeds)
    values["models"] = {
        name: {key: getattr(config, key) for key in MODEL_KEYS}
        for name, config in comparison.models.items()
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {output}: {error.strerror}") from None
    if (output / CONFIG_FILE).is_file():
        before = read_comparison_file(output / CONFIG_FILE)
        for key in values.keys() - MAY_CHANGE - {"models", "seeds"}:
            refuse_change(output, key, before.get(key), values[key])
        for name in before["models"].keys() & values["models"].keys():
            refuse_change(output, name, before["models"][name], values["models"][name])
    write_atomically(
        output / CONFIG_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    )


def read_comparison_file(path: Path) -> dict:
    """Read the file of :func:`claim`.

    Raises:
        InputError: It is damaged.
    """
    try:
        values = load_yaml(read_text(path))
    except OSError as error:
        raise InputError(f"--output: {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--output: {path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("models"), dict):
        raise InputError(f"--output: {path} is damaged; remove it, or choose another folder")
    return values


def refuse_change(output: Path, name: str, before: object, now: object) -> None:
    if before != now:
        raise InputError(
            f"--output: {output} holds a comparison with {name} {before!r}, not {now!r}; choose "
            "another folder"
        )
