"""Pictures of maps: mosaics with marked cells, overlays, principal components, curves."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import NullLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2tvit.figures import FONT, drawable, literal_text
from t2tvit.files import write_figure

# Distinguishable with any colour vision.
DEAD_COLOR, EXPLODING_COLOR, PLAIN_COLOR = (0, 114, 178), (213, 94, 0), (255, 255, 255)
TEXT_COLOR = (26, 26, 26)
# In pixels: width of a cell's frame, height of a heading.
BORDER, LINE = 3, 18


def colored(values: Tensor) -> np.ndarray:
    """A map (h, w) as colours (h, w, 3), uint8, from dark (minimum) to bright (maximum)."""
    values = values.double().nan_to_num(0, 0, 0).numpy()
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return (colormaps["viridis"](scaled)[..., :3] * 255).round().astype(np.uint8)


def mosaic(
    cells: Sequence[np.ndarray],
    columns: int,
    side: int,
    colors: Sequence[tuple] | None = None,
    heads: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Image.Image:
    """Cells (h, w, 3) row by row, all resized so that the longer side of the first is ``side``.

    ``colors`` are the frames of the cells, ``heads`` the headings of the columns, ``rows`` the labels
    to the left of the rows.
    """
    font = heading_font()
    h, w = cells[0].shape[:2]
    scale = side / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    left, head = (math.ceil(max(map(font.getlength, texts), default=0)) for texts in (rows, heads))
    left += 4 * BORDER if rows else 0
    top = LINE if heads else 0
    step_x = max(size[0], head) + 2 * BORDER
    step_y = max(size[1], LINE if rows else 0) + 2 * BORDER
    picture = Image.new("RGB", (left + columns * step_x, top + -(-len(cells) // columns) * step_y))
    picture.paste(PLAIN_COLOR, (0, 0, *picture.size))
    text = ImageDraw.Draw(picture)
    for column, name in enumerate(heads):
        text.text((left + (column + 0.5) * step_x, LINE / 2), name, TEXT_COLOR, font, "mm")
    for row, name in enumerate(rows):
        text.text((left - 2 * BORDER, top + (row + 0.5) * step_y), name, TEXT_COLOR, font, "rm")
    for index, cell in enumerate(cells):
        x, y = left + index % columns * step_x, top + index // columns * step_y
        if colors is not None:
            picture.paste(colors[index], (x, y, x + step_x, y + step_y))
        resized = Image.fromarray(cell).resize(size, Image.Resampling.NEAREST)
        picture.paste(resized, (x + (step_x - size[0]) // 2, y + (step_y - size[1]) // 2))
    return picture


@cache
def heading_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FONT), 12)


def feature_grid(
    maps: Tensor, shown: Sequence[int], dead: Sequence[int], exploding: Sequence[int]
) -> Image.Image:
    """Channels ``shown`` of maps (C, h, w); each has its own range of colours."""
    colors = [
        EXPLODING_COLOR if index in exploding else DEAD_COLOR if index in dead else PLAIN_COLOR
        for index in shown
    ]
    columns = min(16, len(shown))
    return mosaic([colored(maps[index]) for index in shown], columns, 56, colors)


def overlay(picture: Image.Image, values: Tensor) -> np.ndarray:
    """A map, blended with its picture."""
    heat = Image.fromarray(colored(values)).resize(picture.size, Image.Resampling.BICUBIC)
    return np.asarray(Image.blend(picture.convert("RGB"), heat, 0.6))


def components(tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Tokens (T, n) as colours: their first three principal components, as red, green and blue."""
    tokens = tokens.double().nan_to_num(0, 0, 0)
    tokens = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(tokens.t() @ tokens)
    values = tokens @ vectors[:, -3:].flip(1)
    low, high = values.amin(0), values.amax(0)
    values = (values - low) / (high - low).clamp_min(1e-12)
    if values.shape[1] < 3:
        values = values[:, :1].expand(-1, 3)
    return (values.reshape(*grid, 3).numpy() * 255).round().astype(np.uint8)


def marked(cell: np.ndarray, position: tuple[int, int]) -> np.ndarray:
    """The map with one pixel marked."""
    cell = cell.copy()
    cell[position] = EXPLODING_COLOR
    return cell


def draw_approximation(
    errors: Mapping[int, float], own: tuple[int, float], uniform: float, title: str, path: Path
) -> None:
    """Draw the distance from softmax over the number of features."""
    with literal_text([title]):
        write_figure(path, approximation(errors, own, uniform, title), dpi=110)


def approximation(
    errors: Mapping[int, float], own: tuple[int, float], uniform: float, title: str
) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    label = "new features of length √E"
    axes.plot(list(errors), list(errors.values()), "o-", color="#0072B2", label=label)
    axes.plot(*own, "D", color="#D55E00", label="the model's features")
    axes.axhline(uniform, color="0.5", linestyle="--", label="uniform attention")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(errors), [str(count) for count in errors])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="random features", ylabel="distance from softmax", title=drawable(title))
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
