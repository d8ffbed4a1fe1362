"""Figures: learning curves and predictions, as PNG files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from t2tvit.errors import InputError
from t2tvit.figures import drawable, fitted, literal_text
from t2tvit.files import write_figure

# Distinguishable with any colour vision; signs show the same.
TRAIN_COLOR, HELD_OUT_COLOR = "#0072B2", "#D55E00"
RIGHT_COLOR, WRONG_COLOR = "#0072B2", "#D55E00"
# The grid of predictions: at most so many columns, widths in inches, font sizes in points.
MAX_COLUMNS = 8
CELL_WIDTH, CELL_MARGIN, MIN_WIDTH = 1.5, 0.15, 6.0
SIZE, SMALL_SIZE, TITLE_SIZE = 8.5, 6.5, 12
POINTS, RESOLUTION = 72, 120  # points and pixels per inch
CELL_PIXELS, MAX_ASPECT = 256, 24


@dataclass(frozen=True)
class Prediction:
    """An image with its name, the predicted class and its probability, and the actual class.

    ``right`` says whether the prediction is correct. It and ``actual`` are None if unknown.
    """

    image: Image.Image
    name: str
    predicted: str
    probability: float
    actual: str | None = None
    right: bool | None = None


def draw_curves(history: Sequence[dict], path: Path) -> None:
    """Draw loss and accuracy over the epochs."""
    with literal_text():
        save(curves(history), path)


def curves(history: Sequence[dict]) -> Figure:
    epochs = [metrics["epoch"] for metrics in history]
    # A line does not show a value without neighbours, so draw markers.
    values = [metrics[name] for metrics in history for name in ("train_loss", "eval_loss", "top1")]
    sign = "o" if len(epochs) == 1 or not all(map(math.isfinite, values)) else ""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for name, label, color in (
        ("train_loss", "training", TRAIN_COLOR),
        ("eval_loss", "held out", HELD_OUT_COLOR),
    ):
        values = [metrics[name] for metrics in history]
        losses.plot(epochs, values, f"{sign}-", color=color, label=label)
    losses.set(xlabel="epoch", title="loss (training: with augmentation and smoothing)")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    top1 = [metrics["top1"] for metrics in history]
    accuracy.plot(epochs, top1, f"{sign}-", color=HELD_OUT_COLOR)
    accuracy.set(xlabel="epoch", ylim=(0, 102), title="held-out top-1")
    finite = [(value, epoch) for value, epoch in zip(top1, epochs) if math.isfinite(value)]
    if finite:
        best, epoch = max(finite)
        accuracy.plot(epoch, best, "o", color=HELD_OUT_COLOR)
        accuracy.set_title(f"held-out top-1, best {best:.2f}% in epoch {epoch}")
    accuracy.yaxis.set_major_formatter("{x:g}%")
    margin = max(0.5, 0.03 * len(epochs))
    for axes in (losses, accuracy):
        axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_predictions(predictions: Sequence[Prediction], title: str, path: Path) -> None:
    """Draw a grid of images with names and predicted classes; ✓ or ✗ if the actual one is known."""
    texts = [title]
    for each in predictions:
        texts += [each.name, each.predicted, each.actual or ""]
    with literal_text(texts):
        save(grid(predictions, title), path)


def grid(predictions: Sequence[Prediction], title: str) -> Figure:
    columns = min(MAX_COLUMNS, len(predictions))
    rows = -(-len(predictions) // columns)
    width = max(columns * CELL_WIDTH, MIN_WIDTH)
    room = (width / columns - CELL_MARGIN) * POINTS
    captions = [caption(each, room) for each in predictions]
    names = [fitted(drawable(each.name), room, SMALL_SIZE) for each in predictions]
    heading = fitted(drawable(title), (width - CELL_MARGIN) * POINTS, TITLE_SIZE, lines=3)
    lines = max(text.count("\n") + 1 for text in captions)
    height = rows * (CELL_WIDTH + (lines * SIZE + 2 * SMALL_SIZE) * 1.3 / POINTS)
    height += (heading.count("\n") + 1) * 1.5 * TITLE_SIZE / POINTS
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, fontsize=TITLE_SIZE)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells[len(predictions) :]:
        axes.set_axis_off()
    for axes, each, text, name in zip(cells, predictions, captions, names):
        axes.imshow(each.image, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        color = {None: "black", True: RIGHT_COLOR, False: WRONG_COLOR}[each.right]
        axes.set_title(text, color=color, fontsize=SIZE)
        axes.set_xlabel(name, color="0.4", fontsize=SMALL_SIZE)
    return figure


def caption(prediction: Prediction, width: float) -> str:
    """The predicted class and, if it is wrong, the actual one, in lines of ``width`` points."""
    sign = {None: "", True: "✓ ", False: "✗ "}[prediction.right]
    text = f"{sign}{drawable(prediction.predicted)}"
    share = f"{prediction.probability:.0%}"
    lines = fitted(f"{text}  {share}", width, SIZE)
    if "…" in lines:
        lines = f"{fitted(text, width, SIZE, lines=2)}\n{share}"
    if prediction.right is False and prediction.actual is not None:
        lines += "\n" + fitted(f"is {drawable(prediction.actual)}", width, SIZE, lines=2)
    return lines


def thumbnail(image: Image.Image) -> Image.Image:
    """The image, reduced to the size of a cell, and widened if it is too thin to be seen."""
    small = image.copy()
    small.thumbnail((CELL_PIXELS, CELL_PIXELS))
    thinnest = max(small.size) // MAX_ASPECT
    width, height = small.size
    return small.resize((max(width, thinnest), max(height, thinnest)))


def save(figure: Figure, path: Path) -> None:
    try:
        write_figure(path, figure, dpi=RESOLUTION)
    except ValueError as error:
        raise InputError(f"cannot write the figure {path}: {error}") from None
