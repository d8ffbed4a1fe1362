"""Checks of figures: no warnings, and no text is cut off or overlaps another."""

import warnings
from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

# Names of files and classes that have broken figures.
HOSTILE = [
    "$a$",
    "$\\frac{$",
    "cost $5",
    "\\$x^2$",
    "_hidden",
    "100%",
    "%s %d {x}",
    "back\\slash",
    "new\nline",
    "tab\tbell\x07",
    "\x1b[31mred",
    "caf\udce9",
    "猫と犬",
    "🐱🦄👩‍🚀",
    "مرحبا",
    "\u202ereversed",
    "<b>&amp;",
    "x" * 200,
    "a name of many words " * 6,
    "",
    " ",
]


def drawn(figure: Figure) -> FigureCanvasAgg:
    """Draw the figure, with every warning as an error."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.draw()
    return canvas


def texts(figure: Figure) -> list[Text]:
    """All visible text; ticks beyond the ends of an axis are not drawn."""
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (axes.axison and low <= tick.get_loc() <= high):
                    beyond |= {tick.label1, tick.label2}
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in beyond
    ]


def check_layout(figure: Figure) -> None:
    """Check that all texts are inside the figure and do not overlap."""
    renderer = drawn(figure).get_renderer()
    # Without the arrows of annotations.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts(figure)]
    boxes = [(text, box) for text, box in boxes if box.width > 0]
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, f"{text!r} is cut off"
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, f"{text!r} is cut off"
    for (one, first), (other, second) in combinations(boxes, 2):
        assert not first.padded(-0.5).overlaps(second.padded(-0.5)), f"{one!r} covers {other!r}"
