"""What the README shows is run: its Python here, its commands by CI or by make."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    command
    for language, text in BLOCKS
    if language == ""
    for command in text.replace("\\\n", " ").strip().splitlines()
]


@pytest.mark.parametrize("source", PYTHON)
def test_python(source):
    if "import timm" in source:
        pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    exec(compile(source, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_run(command):
    pytest.importorskip("timm")
    from t2tvit.cli import parse

    words = shlex.split(command)
    if "t2tvit" in words:
        parse(words[words.index("t2tvit") + 1 :]) if "--help" not in words else None
    if words[0] == "torchrun":
        # It needs ImageNet; tests/training runs torchrun on other data.
        return
    makefile = (ROOT / "Makefile").read_text().replace("$(DEMO)", "runs/demo")
    makefile = makefile.replace("$(BIN)/", "").replace("$(ABI)/venv/bin/", "")
    makefile = makefile.replace("pip install --verbose", "pip install")
    ran = (ROOT / ".ci" / "run").read_text() + makefile
    assert command in ran, f"{command!r} is run by neither .ci/run nor the Makefile"
