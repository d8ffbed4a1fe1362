"""Output on the terminal: any encoding, odd names, and output that cannot be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from t2tvit.terminal import print_json, printable
from tests.support.commands import weights
from tests.support.training.tiny import TINY

ENCODINGS = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    "posix": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}
NAMES = ("grün €", "\x1b[31mred", "two\nlines")


def run(*arguments, env=None, **options):
    command = (sys.executable, "-m", "t2tvit", *(os.fsencode(each) for each in arguments))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120} | options
    return subprocess.run(command, env=os.environ | (env or {}), **options)


def is_safe(output: bytes) -> bool:
    return all(byte >= 32 or byte == 10 for byte in output)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_predict_shows_any_name_in_any_encoding(tmp_path, encoding, options):
    checkpoint = weights(tmp_path, NAMES)
    names = (b"a\xff.png", "b\x1b[2J\u20ac.png", "c\n.png")
    files = [tmp_path / os.fsdecode(name) for name in names]
    for file in files:
        Image.new("RGB", (40, 40), "red").save(file)
    broken = tmp_path / "broken\x1b\u20ac.png"
    broken.write_bytes(b"no image")
    arguments = ("predict", "--checkpoint", checkpoint, *files, broken, *options)
    done = run(*arguments, env=ENCODINGS[encoding])
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stderr.startswith(b"t2tvit: error: 1 of 4 images: ")
    lines = done.stdout.splitlines()
    assert is_safe(done.stdout) and is_safe(done.stderr)
    if options:
        records = [json.loads(line) for line in lines]
        assert {each["class"] for each in records[0]["predictions"]} == set(NAMES)
        assert len(records) == 4
    else:
        assert len(lines) == 3 and all(rb"two\nlines" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_run_with_odd_names_is_logged_in_any_encoding(tmp_path, encoding):
    root = tmp_path / os.fsdecode("data € \x1b[1m\n".encode() + b"\xff")
    for split in ("train", "val"):
        for number, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for image in range(4):
                Image.new("RGB", (24, 24), (60 * number, 9 * image, 0)).save(
                    root / split / name / f"{image}.png"
                )
    (root / "train" / NAMES[0] / "0.png").write_bytes(b"no image")
    output = tmp_path / os.fsdecode("run €\x1b\n".encode() + b"\xff")
    options = ("--data", f"imagefolder:{root}", "--num-classes", "none", "--epochs", "2")
    done = run("train", *TINY, *options, "--output", output, env=ENCODINGS[encoding])
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"" and is_safe(done.stdout)
    assert b"cannot be read" in done.stdout
    done = run("train", "--output", output, "--resume", "auto", env=ENCODINGS[encoding])
    assert done.returncode == 0 and b"resumed" in done.stdout, done.stderr
    done = run("train", "--output", output, env=ENCODINGS[encoding])
    assert done.returncode == 2 and is_safe(done.stderr) and done.stderr.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_and_conversions_are_printed_in_any_encoding(tmp_path, encoding):
    assert run("models", "t2t_vit_7", env=ENCODINGS[encoding]).returncode == 0
    target = tmp_path / "a\x1b€\n.pth"
    done = run("convert", weights(tmp_path), target, env=ENCODINGS[encoding])
    assert done.returncode == 0, done.stderr
    assert is_safe(done.stdout) and done.stdout.count(b"\n") == 1


def test_printable_text_is_unchanged():
    assert printable("grün, 日本語, a b") == "grün, 日本語, a b"
    assert printable("a\nb\x1b\x9b\u202e\udcff") == r"a\nb\x1b\x9b\u202e\udcff"


COMMANDS = {
    "help": ("--help",),
    "models": ("models", "t2t_vit_7"),
    "train": ("train", *TINY, "--epochs", "2", "--output", "{tmp}/run"),
    "predict": ("predict", "--checkpoint", "{weights}", "{image}"),
    "convert": ("convert", "{weights}", "{tmp}/a.pth"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_cannot_be_written_ends_with_one_line_or_silently(name, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    places = {"tmp": tmp_path, "weights": weights(tmp_path), "image": tmp_path / "a.png"}
    arguments = [each.format(**places) for each in COMMANDS[name]]
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    line = b"t2tvit: error: cannot write to standard output: No space left on device\n"
    assert done.stderr == line
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [each.replace("/run", "/other") for each in arguments]
    done = run(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_json_has_no_non_finite_numbers(capsys):
    print_json({"a": [{"b": float("nan")}, float("-inf")], "c": 0.5, "d": "\x7f\udcff"})
    out = capsys.readouterr().out
    assert out == '{"a": [{"b": null}, null], "c": 0.5, "d": "\\u007f\\udcff"}\n'
