"""The results of a comparison: accuracies, speeds and costs in a table, files and plots."""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2t_kernels.measure import interleave, percentiles
from t2tvit.comparison.plan import CONFIG_FILE, Comparison, place_of
from t2tvit.comparison.runs import built
from t2tvit.comparison.scatter import AXES, Measured, Rate, draw
from t2tvit.data.sources import channels_of
from t2tvit.files import write_atomically
from t2tvit.speed import LARGEST_BATCH, figure, inference_step, print_table, training_step
from t2tvit.terminal import printable
from t2tvit.training.checkpointing import METRICS_FILE
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.environment import describe_device, git_commit, versions

REPETITIONS = 10
RUNS_FILE, MODELS_FILE, TABLE_FILE = "runs.csv", "models.csv", "comparison.md"
# Characters that Markdown or HTML could interpret as markup or links. An underscore inside a word is
# not markup.
MARKUP = re.compile(r"[&<>|`*\\\[\]~$@]|:(?=/)|(?i:(?<=www)\.)|\b_|_\b")
HEAD = ("model", "parameters", "MMACs", "top-1", "seeds", "training", "inference")


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
    world.say("")
    print_table(HEAD, [cells(row) for row in rows])
    for line in about:
        world.say(line)
    write_atomically(output / MODELS_FILE, models_csv(rows))
    write_atomically(output / TABLE_FILE, markdown(rows, about))
    for name, (label, value) in AXES.items():
        draw(rows, label, value, output / f"accuracy-{name}.png")
    world.say(
        f"{TABLE_FILE}, {MODELS_FILE}, {RUNS_FILE}, {CONFIG_FILE} and accuracy-*.png are in {output}",
    )


def last_metrics(place: Path) -> dict:
    return json.loads((place / METRICS_FILE).read_text().splitlines()[-1])


def speeds(comparison: Comparison, world: World) -> dict[str, tuple[Rate, Rate]]:
    """Images per second in training and inference, the models measured in turns."""
    config = comparison.shared
    built_models = {name: built(each, world) for name, each in comparison.models.items()}
    channels = channels_of(config.data)
    images = torch.randn(timed_batch(config), channels, *config.size, device=world.device)
    classes = min(model.num_classes for model, _ in built_models.values())
    labels = torch.randint(classes, (len(images),), device=world.device)
    training, inference = (
        rates_of(make, built_models, images, labels, config, world)
        for make in (training_step, inference_step)
    )
    return {name: (training[name], inference[name]) for name in built_models}


def timed_batch(config: RunConfig) -> int:
    """The batch size for timing in one process, at most LARGEST_BATCH."""
    return min(config.batch_size, LARGEST_BATCH)


def rates_of(
    make, models: dict, images: Tensor, labels: Tensor, config: RunConfig, world: World
) -> dict[str, Rate]:
    steps = {name: make(model, images, labels, config) for name, (model, _) in models.items()}
    seconds = interleave(steps, REPETITIONS, world.device)
    rates = {name: [len(images) / each for each in values] for name, values in seconds.items()}
    return {name: Rate(*percentiles(values)) for name, values in rates.items()}


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
    """The notes below the table."""
    config = comparison.shared
    seeds = ", ".join(str(seed) for seed in comparison.seeds)
    return [
        f"{config.data} at {config.img_size}, {config.epochs} epochs of batches of "
        f"{config.batch_size} for every model, {config.optimizer} at lr {config.lr:g}, amp "
        f"{config.amp}: the same recipe for all",
        f"top-1: on {images:,} held-out images, after the last epoch; mean, minimum and maximum of seeds "
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
    """``text`` on one line, escaped so that Markdown shows it literally."""
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
