"""Predictions of files, folders and lists, as a table and as JSON lines."""

import io
import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

from PIL import Image  # noqa: E402

from tests.laboratory.tiny import CLASS_NAMES, CONFIG, model, run, weights  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Seven images, some of them a folder deeper, and a text."""
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


def test_shares_are_those_of_the_model(folder, tmp_path, capsys):
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
    from t2tvit.cli import main

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


def test_nothing_to_classify(tmp_path, capsys, monkeypatch):
    source = ("predict", "--checkpoint", weights(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in run(capsys, *source, tmp_path / "empty", status=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "got no names of images" in run(capsys, *source, "-", status=2)
    assert "--images: got 0" in run(capsys, *source, "--images", "0", status=2)
