"""Figures: hostile names, file formats, learning curves, and grids of predictions."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib", exc_type=ImportError)

from matplotlib.figure import Figure
from PIL import Image

from t2tvit.charts import (
    Prediction,
    curves,
    draw_curves,
    draw_predictions,
    grid,
    thumbnail,
)
from t2tvit.errors import InputError
from t2tvit.figures import drawable, figure_file, fitted, literal_text, shortened
from tests.support.figure_layout import HOSTILE, check_layout, drawn, texts

RANDOM = np.random.default_rng(0)


# Text


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.parametrize("extension", ["png", "svg", "pdf", "eps"])
def test_any_name_is_drawn_as_it_is(name, extension, tmp_path):
    with warnings.catch_warnings(), literal_text([name]):
        warnings.simplefilter("error")
        figure = Figure()
        axes = figure.subplots()
        axes.set(title=drawable(name), xlabel=drawable(name))
        axes.set_xticks([0.5], [drawable(name)])
        figure.savefig(tmp_path / f"figure.{extension}")
    assert axes.get_title() == drawable(name)


def test_letters_that_no_font_has_are_escaped():
    assert drawable("$\\alpha$ 100% é ✓") == "$\\alpha$ 100% é ✓"
    assert drawable("a\nb\x07\udcff") == "a\\nb\\x07\\udcff"
    assert drawable("\U000e1234") == "\\U000e1234"


def test_fonts_are_found_by_their_letters():
    """A mathematical font of matplotlib has letters that the default font lacks."""
    letter = "\ue000"
    with literal_text([letter]):
        figure = Figure()
        text = figure.text(0.5, 0.5, drawable(letter))
        assert text.get_text() == letter and len(text.get_fontfamily()) == 2
        drawn(figure)


def test_long_text_is_shortened_in_the_middle():
    assert shortened("short.png", 9) == "short.png"
    assert shortened("a_very_long_name.png", 11) == "a_ver…e.png"
    for length in range(1, 25):
        assert len(shortened("a_very_long_name.png", length)) == min(length, 20)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.parametrize("lines", [1, 3])
def test_fitted_text_is_no_wider_than_asked(name, lines):
    with literal_text([name]):
        figure = Figure(dpi=200)
        made = fitted(drawable(name), 90, 9, lines)
        text = figure.text(0, 0, made, fontsize=9)
        renderer = drawn(figure).get_renderer()
        assert text.get_window_extent(renderer).width / 200 * 72 <= 91
    assert made.count("\n") < lines
    if "…" not in made:
        assert "".join(made.split()) == "".join(drawable(name).split())


# Files


def test_a_figure_without_an_extension_is_a_png(tmp_path):
    assert figure_file(tmp_path / "figure", "--plot") == tmp_path / "figure.png"
    for name in ("figure.PNG", "figure.pdf", "figure.jpeg", "$x.svg"):
        assert figure_file(tmp_path / name, "--plot") == tmp_path / name
    assert figure_file(Path("$a.png"), "--plot") == Path("$a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message",
    [
        ("figure.xyz", "extension .xyz, expected one of .*\\.png"),
        ("figure.pgf", "extension .pgf"),
        ("run.v1", "extension .v1"),
        ("folder", "folder is a folder; give the name of a file"),
        ("folder.png", "folder.png is a folder"),
        ("gone/figure.png", "the folder .*gone does not exist; create it"),
        ("file/figure.png", "the folder .*file does not exist"),
        (f"{'x' * 260}.png", "cannot write .*: File name too long"),
    ],
)
def test_files_that_cannot_be_figures(name, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^--plot: .*{message}"):
        figure_file(tmp_path / name, "--plot")


# Learning curves


def history(top1, loss=(1.0,)) -> list[dict]:
    return [
        {"epoch": epoch, "top1": value, "train_loss": loss[0], "eval_loss": loss[-1]}
        for epoch, value in enumerate(top1, 1)
    ]


@pytest.mark.parametrize(
    "metrics",
    [
        history([50.0]),
        history([10.0, 50.0, 40.0]),
        history([math.nan]),
        history([math.nan, 20.0, math.nan], [math.nan, math.inf]),
        history(range(100), [1e30]),
    ],
    ids=["one", "three", "nan", "partly nan", "many"],
)
def test_curves_of_any_history(metrics):
    with literal_text():
        figure = curves(metrics)
        check_layout(figure)
    ticks = [tick for axes in figure.axes for tick in axes.get_xticks()]
    assert all(tick == round(tick) for tick in ticks), "an epoch is a whole number"


def test_one_epoch_can_be_seen(tmp_path):
    draw_curves(history([50.0], [0.5, 1.0]), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    blue = np.array((0, 114, 178))
    # More than the sample in the legend, which is in the upper half.
    assert (np.abs(pixels[100:] - blue).sum(2) < 30).sum() > 20


# Predictions


def image(size=(40, 40), mode="RGB") -> Image.Image:
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8))


def predictions(count: int, names=HOSTILE, **options) -> list[Prediction]:
    return [
        Prediction(
            thumbnail(image(**options)),
            names[number % len(names)],
            names[(number + 1) % len(names)],
            0.5,
            names[(number + 2) % len(names)],
            number % 3 == 0,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 8, 9, 40])
def test_hostile_names_in_a_grid(count, tmp_path):
    for title in ("the held-out digits", f"imagefolder:{'$long/' * 60}"):
        made = predictions(count)
        with literal_text([title, *HOSTILE]):
            check_layout(grid(made, title))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_predictions(made, title, tmp_path / "plot.png")


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("size", [(40, 40), (4000, 3), (3, 4000), (1, 1), (10000, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_of_any_shape(count, size, mode):
    names = ["a class that has a name of exactly sixty characters, I believe"[:60], "cat"]
    made = predictions(count, names, size=size, mode=mode)
    with literal_text():
        figure = grid(made, "title")
        check_layout(figure)
    for axes in figure.axes[:count]:
        extent = axes.images[0].get_window_extent()
        assert min(extent.width, extent.height) >= 3, "the image cannot be seen"


def test_each_image_has_its_file_and_classes():
    pictures = [
        Prediction(image(), "one.png", "cat", 0.987, "cat", True),
        Prediction(image(), f"{'long' * 30}_17.png", "cat", 0.5, "dog", False),
        Prediction(image(), "three.png", "cat", 0.25),
    ]
    with literal_text():
        figure = grid(pictures, "title")
    assert [axes.get_title() for axes in figure.axes] == [
        "✓ cat  99%",
        "✗ cat  50%\nis dog",
        "cat  25%",
    ]
    names = [axes.get_xlabel() for axes in figure.axes]
    assert names[0] == "one.png" and names[2] == "three.png"
    assert names[1].startswith("long") and names[1].endswith("_17.png") and "…" in names[1]
    assert {text.get_text() for text in texts(figure)} >= {"title", "one.png"}


def test_grey_images_keep_their_range():
    dark = Image.new("L", (8, 8), 10)
    with literal_text():
        figure = grid([Prediction(dark, "a", "b", 1.0)], "title")
    assert figure.axes[0].images[0].get_clim() == (0, 255)
