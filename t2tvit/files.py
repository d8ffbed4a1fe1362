"""Files that are replaced as a whole, so that neither a crash nor a full disk loses the old one."""

import contextlib
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from t2tvit.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

# Temporary files, until they are complete.
WRITING = ".*.writing"


def write_atomically(path: Path, content: bytes | memoryview | str) -> None:
    """Replace ``path`` as a whole: a crash leaves the old file or the new one, nothing between.

    A symbolic link is followed.

    Raises:
        RunError: the disk is full, the folder cannot be written to, or ``path`` is not a file.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.writing")
    if target.exists() and not target.is_file():
        raise RunError(f"cannot write {path}: it is not a regular file")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)  # or a power cut could undo the renaming
        os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error for a file that is replaced as a whole, but could not be written."""
    kept = "; the previous content is intact" if path.exists() else ""
    return RunError(f"cannot write {path}: {error.strerror}{kept}")


def write_figure(path: Path, figure: "Figure", dpi: int) -> None:
    """Write a figure of matplotlib in the format of the file's extension, PNG without one.

    Raises:
        ValueError: an unknown format.
        RunError: see :func:`write_atomically`.
    """
    content = BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:].lower() or "png")
    write_atomically(path, content.getbuffer())


def write_png(path: Path, picture: "Image.Image") -> None:
    """Write a picture as PNG.

    Raises:
        RunError: see :func:`write_atomically`.
    """
    content = BytesIO()
    picture.save(content, "png")
    write_atomically(path, content.getbuffer())
