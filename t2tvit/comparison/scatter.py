"""Plots of a comparison: accuracy over cost or speed, with a named point per model."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Line
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from t2tvit.charts import RESOLUTION, save
from t2tvit.figures import drawable, fitted, literal_text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
# In points: font size of names, radius of a marker with its margin, distance from marker to name.
NAME_SIZE, MARKER_RADIUS, NEAR = 7, 4, 6
# The horizontal axis of each plot.
AXES = {
    "parameters": ("parameters (millions)", lambda row: row.parameters / 1e6),
    "macs": ("multiply-adds of an image (millions)", lambda row: row.multiply_adds / 1e6),
    "throughput": ("images per second, training", lambda row: row.training_rate.median),
}


class Rate(NamedTuple):
    """Images per second: the median, the 20th and the 80th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A row of the table; ``top1`` has the value of each seed after the last epoch, in percent."""

    name: str
    parameters: int
    multiply_adds: int
    top1: list[float]
    training_rate: Rate
    inference_rate: Rate


def draw(rows: list[Measured], label: str, value, path: Path) -> None:
    """Write the file of :func:`plot`."""
    with literal_text(row.name for row in rows):
        save(plot(rows, label, value), path)


def plot(rows: list[Measured], label: str, value) -> Figure:
    """Accuracy over ``value``: a point per model, with its name and the range of its seeds."""
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
    if high / low < 10:  # a narrow range may contain no tick of a logarithmic axis
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
    axes: Axes,
    names: Sequence[str],
    xs: Sequence[float],
    bars: Sequence[tuple[float, float, float]],
) -> None:
    """Write each name next to its point, avoiding other names, points and error bars.

    ``bars`` are the minimum, mean and maximum y of each point. A name without space next to its
    point is moved away and connected by a line.
    """
    figure: Any = axes.get_figure(root=True)
    frame, pixel = axes.get_window_extent(), figure.dpi / 72
    renderer = FigureCanvasAgg(figure).get_renderer()
    centers = []
    taken: list[Bbox] = []
    named: list[Bbox] = []
    lines: list[Line] = []
    for x, bar in zip(xs, bars):
        (left, bottom), center, (_, top) = axes.transData.transform([(x, y) for y in bar])
        centers.append(center)
        taken.append(Bbox([[left, bottom], [left, top]]).padded(2 * pixel))
        taken.append(Bbox([center, center]).padded(MARKER_RADIUS * pixel))
    for number, (name, center) in enumerate(zip(names, centers)):
        color = COLORS[number % len(COLORS)]
        label: Any = axes.annotate(
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
    """Candidate offsets in points from a point to the centre of its name, nearest first."""
    for distance in range(NEAR, 400, 4):
        for angle in sorted(np.linspace(-np.pi, np.pi, 16, endpoint=False), key=abs):
            x, y = np.clip(np.sqrt(2) * np.array([np.cos(angle), np.sin(angle)]), -1, 1)
            yield distance, np.array([x * (distance + width / 2), y * (distance + height / 2)])
