"""Figures: learning curves and predictions, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from t2tvit.errors import InputError

# Told apart by people of any colour vision; the signs say the same.
TRAIN_COLOR, HELD_OUT_COLOR = "#0072B2", "#D55E00"
RIGHT_COLOR, WRONG_COLOR = "#0072B2", "#D55E00"
MAX_COLUMNS = 8


def draw_curves(history: Sequence[dict], path: Path) -> None:
    """Loss and accuracy over the epochs."""
    epochs = [metrics["epoch"] for metrics in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for name, label, color in (
        ("train_loss", "training", TRAIN_COLOR),
        ("eval_loss", "held out", HELD_OUT_COLOR),
    ):
        losses.plot(epochs, [metrics[name] for metrics in history], color=color, label=label)
    losses.set(xlabel="epoch", title="loss (training: with augmentation and smoothing)")
    losses.set_ylim(bottom=0)
    losses.legend(frameon=False)
    top1 = [metrics["top1"] for metrics in history]
    best = max(range(len(top1)), key=lambda index: (top1[index], index))
    accuracy.plot(epochs, top1, color=HELD_OUT_COLOR)
    accuracy.plot(epochs[best], top1[best], "o", color=HELD_OUT_COLOR)
    accuracy.set(xlabel="epoch", ylim=(0, 102))
    accuracy.set_title(f"held-out top-1, best {top1[best]:.2f}% in epoch {epochs[best]}")
    accuracy.yaxis.set_major_formatter("{x:g}%")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_predictions(
    images: Sequence[Image.Image],
    predicted: Sequence[str],
    confidence: Sequence[float],
    actual: Sequence[str | None],
    title: str,
    path: Path,
) -> None:
    """A grid of images, each with its predicted class; where the actual one is known, ✓ or ✗."""
    columns = min(MAX_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.4 * max(columns, 4), 1.65 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, name, share, truth in zip(grid, images, predicted, confidence, actual):
        axes.imshow(image, cmap="gray" if image.mode == "L" else None)
        text, color = f"{name}  {share:.0%}", "black"
        if truth is not None:
            right = name == truth
            text = f"✓ {text}" if right else f"✗ {text}, is {truth}"
            color = RIGHT_COLOR if right else WRONG_COLOR
        axes.set_title(text, color=color, fontsize=10)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the figure {path}: {error}") from None
