"""Atomic replacement of files: neither a crash nor a full disk destroys the old file."""

import contextlib
import errno
import os
import stat
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from t2tvit.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

# Temporary files that are not complete yet.
WRITING = ".*.writing"
# Far more than any description of data, a model or a run.
MOST_TEXT = 64 * 2**20


def memory_size() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_file(path: str | PathLike, most: int | None = None) -> None:
    """Raise unless ``path`` is a regular file of at most ``most`` bytes.

    The default of ``most`` is half of this machine's memory, because reading can need twice the size.

    Raises:
        OSError: It is missing, a device or a pipe, or larger. A folder raises when it is opened.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    most = memory_size() // 2 if most is None else most
    if status.st_size > most:
        size = f"it has {status.st_size:,} bytes, more than {most:,}"
        raise OSError(errno.EFBIG, f"too large ({size})", str(path))


def read_bytes(path: str | PathLike) -> bytes:
    """The content of a file that :func:`check_file` allows."""
    check_file(path)
    return Path(path).read_bytes()


def read_text(path: str | PathLike) -> str:
    """The content of a UTF-8 file that describes data, a model or a run.

    Raises:
        OSError: See :func:`check_file`; the limit is MOST_TEXT bytes.
        UnicodeDecodeError: It is not UTF-8.
    """
    check_file(path, MOST_TEXT)
    return Path(path).read_text(encoding="utf-8")


def write_atomically(path: Path, content: bytes | memoryview | str) -> None:
    """Replace ``path`` atomically: a crash leaves either the old or the new file.

    Symbolic links are followed.

    Raises:
        RunError: The disk is full, the folder cannot be written to, or ``path`` is not a file.
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise cannot_write(path, error) from None
    try:
        sync_folder(target.parent)
    except OSError as error:
        raise RunError(
            f"{path} is written, but its folder cannot be synchronised: {error.strerror}"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make renamings in ``folder`` survive a power failure, if its file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error for a file that could not be replaced."""
    kept = "; the previous content is intact" if path.exists() else ""
    return RunError(f"cannot write {path}: {error.strerror}{kept}")


def set_aside(path: Path) -> Path:
    """Rename ``path`` to a free name that ends in ``.set-aside`` (and a number if necessary).

    Raises:
        RunError: It cannot be renamed.
    """
    aside, number = path.with_name(f"{path.name}.set-aside"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.set-aside-{number}")
    try:
        os.replace(path, aside)
    except OSError as error:
        raise RunError(f"cannot rename {path}: {error.strerror}; remove it") from None
    return aside


def write_figure(path: Path, figure: "Figure", dpi: int) -> None:
    """Write a matplotlib figure in the format of the file's extension; PNG without an extension.

    Raises:
        ValueError: The format is unknown.
        RunError: See :func:`write_atomically`.
    """
    content = BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:].lower() or "png")
    write_atomically(path, content.getbuffer())


def write_png(path: Path, picture: "Image.Image") -> None:
    """Write a picture as PNG.

    Raises:
        RunError: See :func:`write_atomically`.
    """
    content = BytesIO()
    picture.save(content, "png")
    write_atomically(path, content.getbuffer())
