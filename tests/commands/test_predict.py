"""Predictions of files, folders and lists, as a table and as JSON lines."""

import io
import json
import sys
import tarfile
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

from PIL import Image

from t2tvit.cli import main
from tests.support.commands import CLASS_NAMES, CONFIG, model, run, weights
from tests.support.figure_layout import HOSTILE


@pytest.fixture
def folder(tmp_path):
    """Seven images, some of them in a subfolder, and a text file."""
    random = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number in range(7):
        pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        place = tmp_path / "images" / ("deep" if number > 4 else ".")
        Image.fromarray(pixels).save(place / f"{number}.{'png' if number % 2 else 'JPG'}", "png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def lines(capsys, *arguments) -> list[dict]:
    out = run(capsys, "predict", "--json", *arguments)
    return [json.loads(line) for line in out.splitlines()]


def test_a_folder_in_batches(folder, tmp_path, capsys):
    source = ("--checkpoint", weights(tmp_path))
    records = lines(capsys, *source, folder, "--batch-size", "3", "--top-k", "2")
    assert [record["file"] for record in records] == [
        *(str(folder / f"{number}.{'png' if number % 2 else 'JPG'}") for number in range(5)),
        *(str(folder / "deep" / name) for name in ("5.png", "6.JPG")),
    ]
    # Batches change nothing, nor do workers.
    alone = lines(capsys, *source, records[5]["file"], "--top-k", "2")
    assert alone[0]["predictions"][0] == pytest.approx(records[5]["predictions"][0], abs=1e-5)
    options = ("--batch-size", "3", "--top-k", "2", "--workers", "1")
    assert lines(capsys, *source, folder, *options) == records


def test_probabilities_are_those_of_the_model(folder, tmp_path, capsys):
    """The image prepared by hand: resized, cropped, normalised."""
    path = folder / "0.JPG"
    (record,) = lines(capsys, "--checkpoint", weights(tmp_path), path, "--top-k", "9")
    image = Image.open(path).resize((60, 40), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.crop((6, 4, 54, 36)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(CONFIG["mean"])) / np.float32(CONFIG["std"])
    with torch.no_grad():
        shares = model()(torch.from_numpy(pixels).permute(2, 0, 1)[None]).softmax(1)[0]
    assert len(record["predictions"]) == 3
    for prediction in record["predictions"]:
        assert prediction["class"] == CLASS_NAMES[prediction["index"]]
        expected = shares[prediction["index"]].item()
        assert prediction["probability"] == pytest.approx(expected, abs=1e-4)


def test_a_list_on_standard_input(folder, tmp_path, capsys, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("rose\ntulip\nlily\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder}/1.png\n\n{folder}/3.png\n"))
    options = ("--class-names", names, "--top-k", "1")
    out = run(capsys, "predict", "--checkpoint", weights(tmp_path), "-", *options)
    first, second = out.splitlines()
    assert first.split()[0] == f"{folder}/1.png" and second.split()[0] == f"{folder}/3.png"
    assert first.split()[1] in ("rose", "tulip", "lily")


def test_images_that_cannot_be_read_do_not_stop_the_others(folder, tmp_path, capsys):
    (folder / "2.JPG").write_bytes(b"no image")
    source = ("--checkpoint", weights(tmp_path), folder, folder / "gone.png")
    line = run(capsys, "predict", *source, status=2)
    for text in ("2 of 8 images: ", "2.JPG cannot be read", "gone.png does not exist"):
        assert text in line
    plot = tmp_path / "plot.png"
    options = [str(argument) for argument in (*source, "--plot", plot, "--images", "3")]
    assert main(["predict", "--json", *options]) == 2
    records = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [("error" in record) for record in records] == [number in (2, 7) for number in range(8)]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_held_out_images_as_json(tmp_path, capsys):
    source = weights(tmp_path, "0123456789", in_chans=1, num_classes=10)
    options = ("--data", "digits", "--images", "3", "--mean", "0.3", "--std", "0.4")
    records = lines(capsys, "--checkpoint", source, *options)
    assert [set(record) for record in records] == 3 * [{"data", "held_out", "label", "predictions"}]
    out = run(capsys, "predict", "--checkpoint", source, *options, "--top-k", "1")
    right = sum(record["predictions"][0]["class"] == record["label"] for record in records)
    assert out.splitlines()[-1].startswith(f"{right} of 3 right, drawn at random")


def test_held_out_images_of_a_folder_are_named(tmp_path, capsys, monkeypatch):
    random = np.random.default_rng(0)
    for split, name in product(("train", "val"), CLASS_NAMES):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for number in range(2):
            pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"${number}.png")
    drawn = []
    monkeypatch.setattr("t2tvit.prediction.draw_predictions", lambda found, *_: drawn.extend(found))
    options = ("--data", f"imagefolder:{tmp_path}/data", "--images", "4")
    source = ("--checkpoint", weights(tmp_path))
    records = lines(capsys, *source, *options, "--plot", tmp_path / "figure")
    for record, prediction in zip(records, drawn, strict=True):
        file = Path(record["file"])
        assert file.is_file() and file.parent == tmp_path / "data" / "val" / record["label"]
        assert (prediction.name, prediction.actual) == (file.name, record["label"])
        assert prediction.right == (prediction.predicted == record["label"])
    out = run(capsys, "predict", *source, *options).splitlines()
    for line, record in zip(out, records, strict=False):
        assert line.startswith(f"{record['file']}, is {record['label']}  ")


def test_held_out_images_of_shards_are_named(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 3)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(tmp_path / "data" / split / f"{shard}.tar", "w") as tar:
                for number in range(count):
                    file = io.BytesIO()
                    pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(file, "png")
                    for key, content in (("png", file.getvalue()), ("cls", str(number).encode())):
                        member = tarfile.TarInfo(f"key{number}.{key}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    options = ("--data", f"webdataset:{tmp_path}/data", "--images", "9")
    records = lines(capsys, "--checkpoint", weights(tmp_path, "012"), *options)
    places = product(range(2), range(3))
    assert [(record["file"], record["label"]) for record in records] == [
        (f"{tmp_path}/data/val/{shard}.tar/key{number}", str(number)) for shard, number in places
    ]


def test_the_plot_has_its_file_name(folder, tmp_path, capsys):
    source = ("--checkpoint", weights(tmp_path), folder / "1.png", "--plot")
    out = run(capsys, "predict", *source, tmp_path / "figure")
    assert out.splitlines()[-1] == f"drawn to {tmp_path / 'figure.png'}"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    # Refused before anything is classified.
    for name in ("figure.xyz", "gone/figure.png", "images"):
        assert main(["predict", *map(str, source), str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("t2tvit: error: --plot: ") and err.count("\n") == 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("count", [1, 9])
def test_hostile_names_are_classified_and_drawn(mode, count, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    names = [name.replace("/", "")[:120] for name in HOSTILE if name.strip()][:count]
    for number, name in enumerate(names):
        size = [(60, 40), (900, 2), (2, 900)][number % 3]
        Image.new("L", size, 99).save(tmp_path / "images" / f"{name}.png")
    options = {} if mode == "RGB" else {"in_chans": 1}
    source = weights(tmp_path, ["$x^2$", "\\frac{$", "猫" * 30], **options)
    statistics = ("--mean", "0.5", "--std", "0.5") if mode == "L" else ()
    arguments = ("--checkpoint", source, tmp_path / "images", *statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run(capsys, "predict", *arguments, "--plot", tmp_path / "$figure$.png")
    assert len(out.splitlines()) == count + 1
    assert (tmp_path / "$figure$.png").is_file()


def test_the_table_is_aligned_for_wide_letters(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("plain", "猫と犬", "cafe\u0301", "＄"):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{name}.png")
    out = run(capsys, "predict", "--checkpoint", weights(tmp_path), tmp_path / "images")
    starts = set()
    for line in out.splitlines():
        start = min(map(line.index, CLASS_NAMES))
        starts.add(start + sum(letter in "猫と犬＄" for letter in line) - line.count("\u0301"))
    assert len(starts) == 1


def test_nothing_to_classify(tmp_path, capsys, monkeypatch):
    source = ("predict", "--checkpoint", weights(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in run(capsys, *source, tmp_path / "empty", status=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "got no names of images" in run(capsys, *source, "-", status=2)
    assert "--images: got 0" in run(capsys, *source, "--images", "0", status=2)
