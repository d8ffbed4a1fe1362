"""The HTML page with pictures and descriptions."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from t2tvit.errors import InputError
from t2tvit.files import write_atomically, write_png
from t2tvit.terminal import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1a1a1a; background: #fff; overflow-wrap: anywhere; }
img { max-width: 100%; }
.table { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; }
th, td { padding: 0.15rem 0.8rem 0.15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
tr + tr { border-top: 1px solid #ddd; }
summary { cursor: pointer; }
.dead { color: #0072B2; font-weight: bold; }
.exploding { color: #D55E00; font-weight: bold; }
.row { display: flex; gap: 1rem; flex-wrap: wrap; }
figure { margin: 0; max-width: 100%; }
figcaption { color: #555; }
"""


class Page:
    """Collects sections, tables and pictures in ``folder``, and writes the page."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        self.parts: list[str] = []

    def make_folder(self) -> None:
        """Create the folder, or raise an InputError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {self.folder}: {error.strerror}") from None

    def save(self, name: str, picture: Image.Image) -> None:
        """Write a picture beside the page, as PNG."""
        write_png(self.folder / name, picture)

    def heading(self, text: str, level: int = 2) -> None:
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{escape(text)}</p>")

    def legend(self, dead: str, exploding: str) -> None:
        self.parts.append(
            f'<p><span class="dead">■ dead</span>: {escape(dead)}; '
            f'<span class="exploding">■ exploding</span>: {escape(exploding)}</p>'
        )

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        cells = "".join(f"<th>{escape(text)}</th>" for text in head)
        lines = [f"<tr>{cells}</tr>"]
        for row in rows:
            cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
            lines.append(f"<tr>{cells}</tr>")
        rows = "\n".join(lines)
        self.parts.append(f'<div class="table"><table>\n{rows}\n</table></div>')

    def pictures(self, *files: tuple[str, str]) -> None:
        """A row of picture files with captions."""
        figures = "".join(
            f'<figure><img src="{escape(name)}" alt="{escape(caption)}" loading="lazy">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for name, caption in files
        )
        self.parts.append(f'<div class="row">{figures}</div>')

    def folded(self, summary: str, name: str, opened: bool) -> None:
        """A picture that can be collapsed."""
        state = " open" if opened else ""
        self.parts.append(
            f"<details{state}><summary>{escape(summary)}</summary>"
            f'<img src="{escape(name)}" alt="{escape(summary)}" loading="lazy"></details>'
        )

    def write(self) -> Path:
        """Write the page; returns its file."""
        path = self.folder / "index.html"
        body = "\n".join(self.parts)
        write_atomically(
            path,
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n{body}\n</body>\n</html>\n",
        )
        return path


def escape(text: str) -> str:
    """``text`` escaped for HTML, on one line, without characters that UTF-8 cannot encode."""
    return html.escape(printable(text))
