"""Text in figures: names are drawn literally, in a font that has their letters, and fitted."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font

from t2tvit.errors import InputError
from t2tvit.terminal import printable

FONT = "DejaVu Sans"  # ships with matplotlib
# Formats of matplotlib that are not picture files, or need LaTeX.
UNSUPPORTED = {"pgf", "raw", "rgba"}
MARKS = "/_-,.;:"


def figure_file(path: Path, option: str) -> Path:
    """The file for a figure at ``path``; without an extension, .png is appended.

    Raises:
        InputError: The extension is unknown, the file is a folder, or its folder does not exist or
            cannot be written to. The message begins with ``option``.
    """
    formats = sorted(set(FigureCanvasAgg.get_supported_filetypes()) - UNSUPPORTED)
    if path.suffix[1:].lower() not in (*formats, ""):
        raise InputError(
            f"{option}: got {path} with the extension {path.suffix}, expected one of "
            f".{', .'.join(formats)}"
        )
    file = path if path.suffix else Path(f"{path}.png")
    for place in (path, file):
        if os.path.isdir(place):
            raise InputError(f"{option}: {place} is a folder; give the name of a file")
    if not os.path.isdir(file.parent):
        raise InputError(
            f"{option}: cannot write {file}: the folder {file.parent} does not exist; create it"
        )
    try:
        with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise InputError(f"{option}: cannot write {file}: {error.strerror}") from None
    return file


@contextmanager
def literal_text(texts: Iterable[str] = ()) -> Iterator[None]:
    """A context in which figures show text literally, in fonts that have the letters of ``texts``.

    Text is not interpreted as mathematics. Also pass each text from the user through
    :func:`drawable`.
    """
    missing = {letter for text in texts for letter in text} - _letters(FONT)
    fonts = sorted({font for font in map(_font_of, missing) if font is not None})
    settings: dict[Any, Any] = {  # matplotlib's own types of its settings list every name
        "font.family": [FONT, *fonts],
        "text.parse_math": False,
        "text.usetex": False,
        "axes.formatter.use_mathtext": False,
    }
    with rc_context(settings):
        yield


def drawable(text: str) -> str:
    """``text`` on one line; control characters and those in no installed font are escaped."""
    return "".join(
        letter if letter in _letters(FONT) or _font_of(letter) else _escape(letter)
        for letter in printable(text)
    )


def shortened(text: str, length: int) -> str:
    """At most ``length`` characters of ``text``: its beginning and its end."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


def fitted(text: str, width: float, size: float, lines: int = 1) -> str:
    """``text`` broken into lines of at most ``width`` points, shortened to fit into ``lines`` lines.

    ``size`` is the font size in points.
    """
    low, high = 1, len(text)
    while low < high:
        length = (low + high + 1) // 2
        if len(_broken(shortened(text, length), width, size)) <= lines:
            low = length
        else:
            high = length - 1
    return "\n".join(_broken(shortened(text, low), width, size))


def _broken(text: str, width: float, size: float) -> list[str]:
    """Lines of at most ``width`` points, broken after a space or mark in their second half."""
    lines, line, used = [], "", 0.0
    for letter in text:
        advance = _advance(letter) * size
        if line and used + advance > width:
            half = len(line) // 2
            spaces, marks = (max(line.rfind(mark) for mark in each) + 1 for each in (" ", MARKS))
            end = next((end for end in (spaces, marks) if end > half), len(line))
            lines.append(line[:end].rstrip())
            line = line[end:]
            used = sum(_advance(each) for each in line) * size
        line += letter
        used += advance
    return [*lines, line]


@cache
def _advance(letter: str) -> float:
    """The width of a letter between others, relative to the font size."""
    size = 100
    with literal_text(letter):
        renderer = FigureCanvasAgg(Figure(dpi=72)).get_renderer()
        alone, among = (
            renderer.get_text_width_height_descent(text, FontProperties(size=size), False)[0]
            for text in ("||", f"|{letter}|")
        )
    return (among - alone) / size


@cache
def _families() -> dict[str, str]:
    """The files of installed upright fonts by name; sans-serif fonts first."""
    files = {
        entry.name: entry.fname
        for entry in fontManager.ttflist
        if (entry.style, entry.stretch, entry.weight) == ("normal", "normal", 400)
        and not entry.name.startswith("Last Resort")  # it has a box for every letter
    }
    return dict(sorted(files.items(), key=lambda item: ("Sans" not in item[0], item[0])))


@cache
def _letters(family: str) -> set[str]:
    """The characters that an installed font has."""
    try:
        return set(map(chr, get_font(_families()[family]).get_charmap()))
    except (OSError, RuntimeError):  # damaged, or removed since matplotlib listed it
        return set()


@cache
def _font_of(letter: str) -> str | None:
    """An installed font that has ``letter``."""
    return next((name for name in _families() if letter in _letters(name)), None)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
