"""Standard output of all commands: characters that are unsafe or cannot be shown are escaped."""

import contextlib
import io
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator

from t2tvit.errors import RunError

# Control characters, line separators, changes of the writing direction, and lone surrogates, which
# represent bytes of a file name that are not UTF-8.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UNSAFE_IN_TEXT = re.compile(UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def printable(text: str) -> str:
    """``text`` on one line: newlines and other unsafe characters become backslash escapes."""
    return UNSAFE.sub(_escape, text)


def padded(text: str, width: int) -> str:
    """``text`` followed by spaces, ``width`` terminal columns wide."""
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """The width of ``text`` in terminal columns: two for a wide letter, none for an accent."""
    shown = [letter for letter in text if unicodedata.category(letter) not in ("Mn", "Me", "Cf")]
    return len(shown) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in shown)


def print_json(record: dict) -> None:
    """Print ``record`` as one line of JSON; characters that cannot be printed are escaped.

    Non-finite numbers, which JSON does not support, become null.
    """
    record = _finite(record)
    text = json.dumps(record, ensure_ascii=False)
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    if UNSAFE.search(text) or not _can_encode(text, encoding):
        text = json.dumps(record)
    print(text, flush=True)


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """A context in which standard output escapes unsafe characters other than newlines.

    Raises:
        BrokenPipeError: The reader of the output has ended.
        RunError: The output cannot be written, for instance because the disk is full.
    """
    before = sys.stdout
    if before is None:  # closed by the caller; a file opened later must not take its descriptor
        before = sys.stdout = open(os.devnull, "w")
    if not isinstance(before, io.TextIOWrapper):  # text in memory, which accepts all characters
        yield
        return
    before.flush()
    output = _Output(
        before.buffer,
        encoding=before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
    )
    sys.stdout = output
    try:
        yield
        output.flush()
    except SystemExit:  # --help and --version end with it
        output.flush()
        raise
    finally:
        sys.stdout = before
        try:
            output.detach()  # also flushes
        except (OSError, RunError):
            _discard(before)
            output.detach()


class _Output(io.TextIOWrapper):
    def write(self, text: str) -> int:
        with _explained():
            super().write(UNSAFE_IN_TEXT.sub(_escape, text))
        return len(text)

    def flush(self) -> None:
        with _explained():
            super().flush()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"cannot write to standard output: {error.strerror}") from None


def _discard(stream: io.TextIOWrapper) -> None:
    """Discard buffered output of ``stream``, so that it does not fail at the interpreter's exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _finite(value: object) -> object:
    """``value`` with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
