"""Code in the documentation works: Python runs here, commands run in CI or by make."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Pages whose commands must be run as they are. Those of the others may have placeholders.
RUN = ["README.md", "CONTRIBUTING.md", "docs/commands.md", "docs/library.md"]
DOCUMENTS = [*RUN, "docs/training.md", "docs/weights.md", "docs/backends.md", "docs/benchmarks.md"]
BLOCKS = [
    (name, language, text)
    for name in DOCUMENTS
    for language, text in re.findall(
        r"^```(\w*)\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE
    )
]
PYTHON = [(name, text) for name, language, text in BLOCKS if language == "python"]
COMMANDS = [
    (name, command)
    for name, language, text in BLOCKS
    if language == ""
    for command in text.replace("\\\n", " ").strip().splitlines()
]


@pytest.mark.parametrize(("name", "source"), PYTHON)
def test_python(name, source):
    if "import timm" in source:
        pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    exec(compile(source, name, "exec"), {})


@pytest.mark.parametrize("command", [command for _, command in COMMANDS if "t2tvit" in command])
def test_command_has_known_options(command):
    pytest.importorskip("timm")
    from t2tvit.cli import parse

    words = shlex.split(re.split(r"\s{3,}(?=\w)", command)[0])  # without a remark beside it
    if "t2tvit" in words and "--help" not in words:
        parse(words[words.index("t2tvit") + 1 :])


@pytest.mark.parametrize("command", [command for name, command in COMMANDS if name in RUN])
def test_command_is_run(command):
    if "imagefolder:PATH" in command:
        # It needs ImageNet; tests/training runs torchrun on other data.
        return
    makefile = (ROOT / "Makefile").read_text().replace("$(DEMO)", "runs/demo")
    makefile = makefile.replace("$(BIN)/", "").replace("$(ABI)/venv/bin/", "")
    makefile = makefile.replace("pip install --verbose", "pip install")
    ran = (ROOT / ".ci" / "run").read_text() + makefile
    assert command in ran, f"{command!r} is run by neither .ci/run nor the Makefile"


def links() -> list[tuple[Path, str]]:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith(("http://", "https://"))
    ]


@pytest.mark.parametrize(
    ("page", "target"), links(), ids=lambda value: getattr(value, "name", value)
)
def test_link_leads_to_a_file_and_a_heading(page, target):
    path, _, heading = target.partition("#")
    file = page.parent / path if path else page
    assert file.exists(), f"{page.name} links to {target}"
    if heading:
        titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
        assert heading in anchors, f"{page.name} links to {target}"
