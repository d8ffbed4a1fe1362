"""Reads files of weights without running code, and says what other files are."""

import argparse
import json
import os
import pickletools
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch

from t2tvit.errors import InputError
from t2tvit.files import check_file

# The part of torch.load's error that names what weights_only refuses.
UNSAFE = re.compile(r"(?i)unsupported (?:global|class|type)\S* (?:GLOBAL )?([a-z_][\w.]*)")
SAFETENSORS, TORCH = "safetensors", "torch"
# The first bytes of a file in torch.save's older format, before zip archives.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
HEADER_BYTES = 8
PICKLE = b"\x80"
ZIP, EMPTY_ZIP = b"PK\x03\x04", b"PK\x05\x06"
# The first bytes of files that are not weights, and their descriptions.
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"\xff\xd8\xff": "a JPEG image, not weights",
    b"\x89PNG": "a PNG image, not weights",
    b"GIF8": "a GIF image, not weights",
    b"RIFF": "a WebP or other RIFF file, not weights",
    b"%PDF": "a PDF document, not weights",
    b"\x1f\x8b": "a gzip archive; unpack it and give the file inside",
    b"BZh": "a bzip2 archive; unpack it and give the file inside",
    b"\xfd7zXZ": "an xz archive; unpack it and give the file inside",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it and give the file inside",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the file inside",
    b"Rar!": "a RAR archive; unpack it and give the file inside",
    b"\x89HDF": "an HDF5 file; only PyTorch and safetensors files are read",
    b"\x93NUMPY": "a NumPy array; only PyTorch and safetensors files are read",
}
# Types of values that training scripts save with the weights. They become Ignored, so no code runs.
HARMLESS = (
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.ndarray", "_codecs.encode"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath"),
    *("pathlib.PureWindowsPath", "pathlib.Path"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
)
# Names that a pickle of tensors and plain values contains.
OF_TENSORS = re.compile(
    r"torch\.(_utils\._rebuild\w+|_tensor\._rebuild\w+|nn\.parameter\.Parameter|storage\.\w+"
    r"|[A-Z]\w+|b?float\w+|u?int\w+|complex\w+|bool|device|serialization\._get_layout)"
    r"|collections\.OrderedDict|argparse\.Namespace"
)
# Called with a number, it allocates this many bytes of memory.
BYTEARRAY = ("builtins.bytearray", "__builtin__.bytearray")
# torch.save's older format has four pickles before the data of the tensors.
PICKLES = 4


class Ignored:
    """Replaces a value that is saved with the weights but not needed."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def read_file(path: str | PathLike) -> object:
    """The content of a ``.safetensors`` file, or of a file written by ``torch.save``, on the CPU.

    The format is recognised by the content, not the file's name.

    Raises:
        InputError: The file is something else, damaged, or cannot be read without running code.
    """
    path = Path(path)
    return _read_safetensors(path) if kind_of(path) == SAFETENSORS else _read_torch(path)


def kind_of(path: Path) -> str:
    """``SAFETENSORS`` or ``TORCH``.

    Raises:
        InputError: The file is missing or of another kind; the message says what it is.
    """
    if os.path.isdir(path):
        if (path / "best.safetensors").is_file():
            raise _is(path, "the folder of a run; give --run, or its best.safetensors as the file")
        if (path / "config.json").is_file():
            raise _is(path, f"a folder; give it as local-dir:{path}")
        raise _is(path, "a folder, not a file")
    if not os.path.exists(path):
        raise InputError(f"checkpoint: {path} does not exist")
    try:
        check_file(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise InputError(f"checkpoint: cannot read {path}: {error.strerror}") from None
    if not head:
        raise _is(path, "empty; download or copy it again")
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            raise _is(path, what)
    if head[HEADER_BYTES : HEADER_BYTES + 1] == b"{":
        if int.from_bytes(head[:HEADER_BYTES], "little") > size:
            raise _is(path, "truncated; download or copy it again")
        return SAFETENSORS
    if head.startswith((ZIP, EMPTY_ZIP)):
        _check_zip(path, size)
        return TORCH
    if head.startswith(LEGACY):
        return TORCH
    with path.open("rb") as file:
        is_pickle = head.startswith(PICKLE) or any(_names(file))
    if is_pickle:
        raise _is(path, "a pickle not written by torch.save; it could run code, so it is not read")
    if head[257:262] == b"ustar" or tarfile.is_tarfile(path):
        raise _is(path, "a tar archive; unpack it and give the file inside")
    _check_text(path, head)
    raise _is(path, "neither a PyTorch nor a safetensors file, or it is damaged")


def _names(file: IO[bytes]) -> Iterator[str]:
    """The names of classes and functions in the pickles from here on, up to the first damage."""
    try:
        for _ in range(PICKLES):
            words, latest = ["", ""], None
            memo: dict[object, object] = {}
            value: Any
            for opcode, value, _ in pickletools.genops(file):
                if opcode.name == "MEMOIZE":
                    memo[len(memo)] = latest
                elif opcode.name.endswith("PUT"):
                    memo[value] = latest
                elif opcode.name in ("GLOBAL", "INST"):
                    latest = name = value.replace(" ", ".")
                    yield name
                elif opcode.name == "STACK_GLOBAL":
                    latest = name = ".".join(words)
                    yield name
                else:
                    latest = memo.get(value, "") if opcode.name.endswith("GET") else value
                    if isinstance(latest, str):
                        words = [words[1], latest]
    except (ValueError, struct.error, OverflowError):
        return


def _names_in(path: Path) -> list[str]:
    """:func:`_names` of a file written by ``torch.save``."""
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            file.seek(0)
            return list(_names(file))
        with zipfile.ZipFile(file) as archive:
            records = [each for each in archive.infolist() if each.filename.endswith("data.pkl")]
            return [name for record in records for name in _names(archive.open(record))]


def _is(path: Path, what: str) -> InputError:
    return InputError(f"checkpoint: {path} is {what}")


def _check_text(path: Path, head: bytes) -> None:
    """If a file is text, raise an error that says what kind of text."""
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    if text[:1] == "<":
        raise _is(
            path,
            "an HTML page, not weights; open its URL in a browser to see why, and download the file "
            "again",
        )
    if b"\0" in head or len(text) < 0.9 * len(head.strip()):
        return
    if path.suffix in (".yaml", ".yml"):
        raise _is(path, "a YAML file, not weights; a configuration is given as --config")
    kind = "JSON" if text[:1] in "{[" else "text"
    first = text.splitlines()[0][:40] if text else ""
    raise _is(path, f"a {kind} file, not weights; it begins with {first!r}")


def _check_zip(path: Path, size: int) -> None:
    """Raise unless a zip archive is a checkpoint that is no larger in memory than on disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise _is(path, "truncated or damaged; download or copy it again") from None
    names = {record.filename.partition("/")[2] or record.filename for record in records}
    if any(name.startswith(("models/", "archive_format", "data/aotinductor")) for name in names):
        raise _is(path, "an exported program, not weights; give the file it was exported from")
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        raise _is(
            path, "a TorchScript archive, which contains code; give the weights it was made from"
        )
    if any(name.endswith(".npy") for name in names):
        raise _is(path, "a NumPy archive; only PyTorch and safetensors files are read")
    if "data.pkl" not in names:
        raise _is(
            path, "a zip archive without a PyTorch checkpoint; unpack it, give the file inside"
        )
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    expanded = sum(record.file_size for record in records)
    if packed or expanded > size:
        raise _is(
            path,
            f"a zip archive of {size} bytes that expands to {expanded} bytes; torch.save does not "
            "compress, so it is not read",
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise InputError(
            f"checkpoint: reading {path} needs the package safetensors; `pip install safetensors`"
        ) from error
    try:
        content = path.read_bytes()
        state = load(content)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _is(path, f"truncated or damaged ({error}); download or copy it again") from None
    length = int.from_bytes(content[:HEADER_BYTES], "little")
    header = json.loads(content[HEADER_BYTES : HEADER_BYTES + length])
    if "t2tvit_state" in (header.get("__metadata__") or ()):
        raise _is(
            path,
            "the training state of a run, not weights; give best.safetensors or last.safetensors "
            "in its folder, or resume the run with --resume",
        )
    return state


def _read_torch(path: Path) -> object:
    # Published checkpoints contain a Namespace of options, which runs no code when it is read.
    allowed: list = [argparse.Namespace, *((Ignored, name) for name in HARMLESS)]
    names = _names_in(path)
    if any(name in BYTEARRAY for name in names):
        raise _unsafe(path, "a bytearray, and reading it could fill the memory")
    try:
        # From an open file, because torch.load interprets the extension of a path.
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals(allowed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter(
                "ignore"
            )  # of pickle protocols and tensor kinds: errors name them
            content = torch.load(file, map_location="cpu", weights_only=True)
    # Damaged files raise many kinds of error: no narrower base exists.
    except Exception as error:
        found = UNSAFE.search(str(error))
        foreign = [
            name for name in names if name not in HARMLESS and not OF_TENSORS.fullmatch(name)
        ]
        if found or foreign:
            name = found[1] if found else foreign[0][:80]
            raise _unsafe(path, f"{name}, and reading it could run code") from error
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise InputError(
                f"checkpoint: {path} is damaged or holds more than tensors and plain values, and reading "
                "it could run code, so it is not read. Ask the author of the file for its state dict "
                "only, preferably as safetensors"
            ) from error
        cause = str(error).strip().split("\n")[0][:120]
        raise _is(
            path,
            f"truncated or damaged ({type(error).__name__}: {cause}); download or copy it again",
        ) from error
    _check_tensors(content, path)
    return content


def _unsafe(path: Path, what: str) -> InputError:
    return InputError(
        f"checkpoint: {path} holds {what}, so it is not read. Ask the author of the file for its "
        "state dict only, preferably as safetensors"
    )


def _check_tensors(content: object, path: Path) -> None:
    """Raise unless every tensor in nested mappings is plain and not larger than the file."""
    size, waiting = path.stat().st_size, [content]
    seen = set()  # a small file can contain the same mapping in very many places
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values()
        if not isinstance(value, torch.Tensor):
            continue
        plain = value.layout == torch.strided and not value.is_quantized
        if not plain or value.device.type != "cpu":
            kind = "quantized" if value.is_quantized else f"{value.layout} {value.device}"
            raise InputError(
                f"checkpoint: {path} holds tensors that are {kind}, expected plain ones"
            )
        if value.numel() * value.element_size() > size:
            raise _is(
                path,
                f"a file of {size} bytes with a larger tensor of {tuple(value.shape)}, so it is not "
                "read",
            )
