"""``t2tvit compare``: many models trained with one budget on the same data, in a table and plots."""

import argparse
import csv
import io
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Line
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from torch import Tensor

from t2t_kernels.measure import interleave, percentiles
from t2tvit.data.sources import channels_of, open_split
from t2tvit.errors import InputError, unknown_name
from t2tvit.figures import drawable, fitted, literal_text
from t2tvit.files import read_text, write_atomically
from t2tvit.models.cost import multiply_adds
from t2tvit.terminal import printable
from t2tvit.training import distributed
from t2tvit.training.bench import (
    LARGEST_BATCH,
    figure,
    inference_step,
    print_table,
    training_step,
)
from t2tvit.training.build import build_model, create_args, describe_device, try_forward
from t2tvit.training.config import RunConfig, convert, from_dict, load_yaml, read_yaml, write_yaml
from t2tvit.training.distributed import World, on_main
from t2tvit.training.keeper import Signals, Stopped
from t2tvit.training.options import given
from t2tvit.training.pipeline import size_of
from t2tvit.training.plots import RESOLUTION, save
from t2tvit.training.progress import duration, say
from t2tvit.training.report import git_commit, versions
from t2tvit.training.run import choose_config, find_place, run
from t2tvit.training.state import METRICS_FILE

PACKAGED = Path(__file__).parent / "comparisons"
# What may differ between the models; all else is the budget, which they share.
MODEL_KEYS = ("model", "model_args", "drop_path")
# What may differ between the beginning of a comparison and its continuation, besides more models and
# seeds: nothing that changes a result.
MAY_CHANGE = {
    *("workers", "device", "fused_kernels", "checkpoint_minutes", "keep_checkpoints", "profile"),
    *("tensorboard", "wandb"),
}
REPETITIONS = 10
CONFIG_FILE, RUNS_FILE, MODELS_FILE = "comparison.yaml", "runs.csv", "models.csv"
TABLE_FILE = "comparison.md"
# What Markdown or HTML could read as markup or as a link. An underscore inside a word is no markup.
MARKUP = re.compile(r"[&<>|`*\\\[\]~$@]|:(?=/)|(?i:(?<=www)\.)|\b_|_\b")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
# In points: the names' font, a point with its surroundings, and the room between point and name.
NAME_SIZE, MARKER_RADIUS, NEAR = 7, 4, 6


@dataclass(frozen=True)
class Comparison:
    """What is compared: a configuration for each name, which differ in MODEL_KEYS, and seeds."""

    shared: RunConfig
    models: dict[str, RunConfig]
    seeds: tuple[int, ...]

    def runs(self) -> list[tuple[str, int]]:
        """Seed by seed, so that an early table has all models."""
        return [(name, seed) for seed in self.seeds for name in self.models]


class Rate(NamedTuple):
    """Images per second: the median, the 20th and the 80th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A row of the table; ``top1`` is each seed's, after the last epoch, in percent."""

    name: str
    parameters: int
    multiply_adds: int
    top1: list[float]
    training_rate: Rate
    inference_rate: Rate


def compare_command(arguments: argparse.Namespace) -> None:
    """Run ``t2tvit compare`` with its parsed arguments.

    Raises:
        InputError: something the user can fix.
    """
    if arguments.output is None:
        raise InputError("--output: none given; name the folder that the comparison may write to")
    comparison = read_comparison(
        arguments.config, arguments.models, arguments.seeds, given(arguments)
    )
    output = arguments.output
    with distributed.joined(comparison.shared.device) as world:
        try:
            costs = {name: cost(config, world) for name, config in comparison.models.items()}
            on_main(world, lambda: claim(comparison, output))
            train_all(comparison, output, world)
            if world.is_main:
                report(comparison, costs, output, world)
        except Stopped as stopped:
            say(world, f"stopped by a signal; repeat the command to resume from {output}")
            stopped.end_elsewhere()


def read_comparison(
    config: str | None, names: Sequence[str], seeds: Sequence[int] | None, overrides: dict
) -> Comparison:
    """A comparison from a file or packaged name, or of the models ``names`` as they are.

    Raises:
        InputError: an unknown key, a model's key that belongs to the budget, or nothing to compare.
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
            raise InputError(f"{source}: got {keys!r}, expected keys, model among them")
        for key in keys:
            if key not in MODEL_KEYS:
                raise InputError(f"{source}: {unknown_name('key', str(key), MODEL_KEYS)}")
        own = {key: convert(key, value, f"{source}: {key}") for key, value in keys.items()}
        models[str(name)] = replace(shared, **({"model_args": {}} | own))
    if len({folder_of(name) for name in models}) < len(models):
        raise InputError(f"config {config}: models: two names differ in punctuation alone")
    return Comparison(shared, models, checked_seeds(seeds or listed_seeds))


def checked_seeds(seeds: object) -> tuple[int, ...]:
    if not isinstance(seeds, Sequence) or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds: got {seeds!r}, expected different whole numbers")
    return tuple(convert("seed", seed, "seeds") for seed in seeds)


def folder_of(name: str) -> str:
    """A model's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def place_of(output: Path, name: str, seed: int) -> Path:
    return output / folder_of(name) / f"seed-{seed}"


def cost(config: RunConfig, world: World) -> tuple[int, int]:
    """Parameters and multiply-adds of a model; it is shown to run before anything is written."""
    model, channels = built(config, world)
    try_forward(model, config, channels, world)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, multiply_adds(model, size_of(config), channels)


def built(config: RunConfig, world: World) -> tuple[torch.nn.Module, int]:
    """The model of a configuration with new weights, and the channels of its images."""
    channels = channels_of(config.data)
    classes = config.num_classes
    if classes is None:
        classes = len(open_split(config.data, "val", img_size=size_of(config)).class_names)
    args = create_args(config, classes, channels)
    return build_model(config.model, args, config.fused_kernels).to(world.device), channels


def claim(comparison: Comparison, output: Path) -> None:
    """Record what is compared in ``output``, which may hold a part of the same comparison.

    Raises:
        InputError: ``output`` holds another one, or is no folder.
    """
    values = yaml.safe_load(write_yaml(comparison.shared))
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
    """What :func:`claim` wrote.

    Raises:
        InputError: it is damaged.
    """
    try:
        values = load_yaml(read_text(path))
    except OSError as error:
        raise InputError(f"--output: {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--output: {path} is not YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("models"), dict):
        raise InputError(f"--output: {path} is damaged; remove it, or compare into another folder")
    return values


def refuse_change(output: Path, name: str, before: object, now: object) -> None:
    if before != now:
        raise InputError(
            f"--output: {output} holds a comparison with {name} {before!r}, not {now!r}; compare "
            "into another folder"
        )


def train_all(comparison: Comparison, output: Path, world: World) -> None:
    """Train every model with every seed, going on where a run was interrupted.

    Raises:
        Stopped: by a signal; what was done is kept.
        InputError: ``output`` holds a run of another configuration.
    """
    runs = comparison.runs()
    started, whole = time.perf_counter(), []
    for number, (name, seed) in enumerate(runs, 1):
        say(world, "")
        left = len(runs) - number + 1
        times = ""
        if whole:
            times = f"; {duration(time.perf_counter() - started)} so far"
            times += f", about {duration(statistics.mean(whole) * left)} left"
        say(world, f"run {number} of {len(runs)}: {name}, seed {seed}{times}")
        torch._dynamo.reset()  # or compiled models would count against each other's limit
        place = find_place(place_of(output, name, seed), "auto")
        config = replace(comparison.models[name], seed=seed)
        with Signals() as signals:
            begun = time.perf_counter()
            run(choose_config(None, asdict(config), place), place, world, signals, left)
            if place.state_path is None:
                whole.append(time.perf_counter() - begun)


def report(
    comparison: Comparison, costs: dict[str, tuple[int, int]], output: Path, world: World
) -> None:
    """Measure the speeds, print the table, and write it with the plots."""
    last = {
        name: [last_metrics(place_of(output, name, seed)) for seed in comparison.seeds]
        for name in comparison.models
    }
    top1 = {name: [metrics["top1"] for metrics in of_seeds] for name, of_seeds in last.items()}
    images = max(metrics["eval_images"] for of_seeds in last.values() for metrics in of_seeds)
    about = notes(comparison, images, world)
    write_atomically(output / RUNS_FILE, runs_csv(top1, comparison.seeds))
    rates = speeds(comparison, world)
    rows = [Measured(name, *costs[name], top1[name], *rates[name]) for name in comparison.models]
    rows.sort(key=lambda row: -statistics.mean(row.top1))
    say(world, "")
    print_table(HEAD, [cells(row) for row in rows])
    for line in about:
        say(world, line)
    write_atomically(output / MODELS_FILE, models_csv(rows))
    write_atomically(output / TABLE_FILE, markdown(rows, about))
    for name, (label, value) in AXES.items():
        draw(rows, label, value, output / f"accuracy-{name}.png")
    say(
        world,
        f"{TABLE_FILE}, {MODELS_FILE}, {RUNS_FILE}, {CONFIG_FILE} and accuracy-*.png are in {output}",
    )


def last_metrics(place: Path) -> dict:
    return json.loads((place / METRICS_FILE).read_text().splitlines()[-1])


def speeds(comparison: Comparison, world: World) -> dict[str, tuple[Rate, Rate]]:
    """Images per second in training and inference, the models measured in turns."""
    config = comparison.shared
    built_models = {name: built(each, world) for name, each in comparison.models.items()}
    channels = channels_of(config.data)
    images = torch.randn(timed_batch(config), channels, *size_of(config), device=world.device)
    classes = min(model.num_classes for model, _ in built_models.values())
    labels = torch.randint(classes, (len(images),), device=world.device)
    training, inference = (
        rates_of(make, built_models, images, labels, config, world)
        for make in (training_step, inference_step)
    )
    return {name: (training[name], inference[name]) for name in built_models}


def timed_batch(config: RunConfig) -> int:
    """One process times a batch that all of them may share in training."""
    return min(config.batch_size, LARGEST_BATCH)


def rates_of(
    make, models: dict, images: Tensor, labels: Tensor, config: RunConfig, world: World
) -> dict[str, Rate]:
    steps = {name: make(model, images, labels, config) for name, (model, _) in models.items()}
    seconds = interleave(steps, REPETITIONS, world.device)
    rates = {name: [len(images) / each for each in values] for name, values in seconds.items()}
    return {name: Rate(*percentiles(values)) for name, values in rates.items()}


HEAD = ("model", "parameters", "MMACs", "top-1", "seeds", "training", "inference")
# Plots: the horizontal axis of each.
AXES = {
    "parameters": ("parameters (millions)", lambda row: row.parameters / 1e6),
    "macs": ("multiply-adds of an image (millions)", lambda row: row.multiply_adds / 1e6),
    "throughput": ("images per second, training", lambda row: row.training_rate.median),
}


def cells(row: Measured) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.parameters:,}",
        f"{row.multiply_adds / 1e6:,.1f}",
        f"{statistics.mean(row.top1):.2f}%",
        f"{min(row.top1):.2f}–{max(row.top1):.2f}%",
        *(
            f"{figure(rate.median)}/s ({figure(rate.low)}–{figure(rate.high)})"
            for rate in (row.training_rate, row.inference_rate)
        ),
    )


def notes(comparison: Comparison, images: int, world: World) -> list[str]:
    """What the table's figures are."""
    config = comparison.shared
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    return [
        f"{config.data} at {config.img_size}, {config.epochs} epochs of batches of "
        f"{config.batch_size} for every model, {config.optimizer} at lr {config.lr:g}, amp "
        f"{config.amp}: one recipe for all",
        f"top-1: of {images:,} held-out images, after the last epoch; mean, least and most of seeds "
        f"{seeds}; one image is {100 / images:.2f}%",
        f"images per second: median, 20th and 80th percentile of {REPETITIONS} repetitions in turns "
        f"with batches of {timed_batch(config)} on {describe_device(world.device)}, the model alone: "
        "no loader, averaging or compiling",
    ]


def markdown(rows: list[Measured], notes: list[str]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    lines += ["| " + " | ".join(map(literal_markdown, cells(row))) + " |" for row in rows]
    lines += ["", *(f"- {literal_markdown(line)}" for line in notes)]
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += [f"- {about}; source {git_commit() or 'not under git'}", ""]
    lines += [f"![accuracy against {name}](accuracy-{name}.png)" for name in AXES]
    return "\n".join(lines) + "\n"


def literal_markdown(text: str) -> str:
    """``text`` on one line, shown by Markdown as it is, with no markup, links or HTML."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", printable(text))


def models_csv(rows: list[Measured]) -> str:
    head = ("model", "parameters", "multiply_adds", "top1_mean", "top1_least", "top1_most")
    rates = (
        f"{kind}_images_per_second{of}"
        for kind in ("training", "inference")
        for of in ("", "_20th", "_80th")
    )
    return as_csv(
        (*head, *rates),
        (
            (
                *(row.name, row.parameters, row.multiply_adds),
                *(round(f(row.top1), 4) for f in (statistics.mean, min, max)),
                *(round(rate, 1) for rate in (*row.training_rate, *row.inference_rate)),
            )
            for row in rows
        ),
    )


def runs_csv(top1: dict[str, list[float]], seeds: Sequence[int]) -> str:
    return as_csv(
        ("model", "seed", "top1"),
        (
            (name, seed, round(value, 4))
            for name, values in top1.items()
            for seed, value in zip(seeds, values)
        ),
    )


def as_csv(head: Sequence[str], rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((head, *rows))
    return text.getvalue()


def draw(rows: list[Measured], label: str, value, path: Path) -> None:
    """Write the file of :func:`plot`."""
    with literal_text(row.name for row in rows):
        save(plot(rows, label, value), path)


def plot(rows: list[Measured], label: str, value) -> Figure:
    """Accuracy over ``value``: a point per model with its seeds' spread, and its name."""
    # Labels are placed in pixels, so the resolution is that of the file.
    drawn = Figure(figsize=(8, 5), dpi=RESOLUTION, layout="constrained")
    axes = drawn.subplots()
    bars = []
    for number, row in enumerate(rows):
        mean = statistics.mean(row.top1)
        spread = [[mean - min(row.top1)], [max(row.top1) - mean]]
        color = COLORS[number % len(COLORS)]
        axes.errorbar(value(row), mean, yerr=spread, fmt="o", color=color, capsize=3)
        bars.append((min(row.top1), mean, max(row.top1)))
    axes.set(xlabel=label, ylabel="held-out top-1 (%), mean and range of the seeds", xscale="log")
    axes.margins(x=0.15, y=0.1)
    low, high = axes.get_xlim()
    if high / low < 10:  # a narrow range may hold no round number of a logarithmic axis
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1), min(high, 101))
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    drawn.draw_without_rendering()
    drawn.set_layout_engine("none")
    name_points(axes, [row.name for row in rows], [value(row) for row in rows], bars)
    return drawn


def name_points(
    axes: Axes, names: Sequence[str], xs: Sequence[float], bars: Sequence[tuple[float, float, float]]
) -> None:
    """Write each name beside its point, off the other names, points and error bars.

    ``bars`` are the lowest, the mean and the largest y of each point. A name that has no room
    next to its point is moved away and a line leads to it.
    """
    frame, pixel = axes.get_window_extent(), axes.figure.dpi / 72
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    centers, taken, named, lines = [], [], [], []
    for x, bar in zip(xs, bars):
        (left, bottom), center, (_, top) = axes.transData.transform([(x, y) for y in bar])
        centers.append(center)
        taken.append(Bbox([[left, bottom], [left, top]]).padded(2 * pixel))
        taken.append(Bbox([center, center]).padded(MARKER_RADIUS * pixel))
    for number, (name, center) in enumerate(zip(names, centers)):
        color = COLORS[number % len(COLORS)]
        label = axes.annotate(
            fitted(drawable(name), 0.4 * frame.width / pixel, NAME_SIZE),
            (xs[number], bars[number][1]),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=NAME_SIZE,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )
        size = np.array(Text.get_window_extent(label, renderer).size)
        fewest = math.inf
        for distance, offset in offsets(*(size / pixel)):
            middle = center + offset * pixel
            box, line = Bbox([middle - size / 2, middle + size / 2]), Line([center, middle])
            inside = frame.contains(*box.min) and frame.contains(*box.max)
            covered = sum(other.overlaps(box) for other in taken)
            crossed = sum(other.intersects_bbox(box, filled=False) for other in lines)
            crossed += sum(line.intersects_bbox(other, filled=False) for other in named)
            faults = 100 * (not inside) + covered + crossed
            if faults < fewest:
                best, fewest = (distance, offset, box, line), faults
            if not faults:
                break
        distance, label.xyann, box, line = best
        label.arrow_patch.set_visible(distance > NEAR)
        taken.append(box)
        named.append(box)
        lines += [line] if distance > NEAR else []


def offsets(width: float, height: float) -> Iterator[tuple[float, np.ndarray]]:
    """Where a name's centre can be, seen from its point: the nearest places first, in points."""
    for distance in range(NEAR, 400, 4):
        for angle in sorted(np.linspace(-np.pi, np.pi, 16, endpoint=False), key=abs):
            x, y = np.clip(np.sqrt(2) * np.array([np.cos(angle), np.sin(angle)]), -1, 1)
            yield distance, np.array([x * (distance + width / 2), y * (distance + height / 2)])
