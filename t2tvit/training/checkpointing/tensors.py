"""Files of tensors with a description and a checksum of both, in the .safetensors format."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load, save

from t2tvit.files import read_bytes, write_atomically


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str, content: object) -> None:
    """Write a .safetensors file whose metadata has ``content`` and a checksum of all under ``key``.

    Raises:
        RunError: the disk is full, or the folder not to be written to.
    """
    # In memory first, so that a full disk is met where it is reported.
    write_atomically(path, tensors_file(tensors, key, content))


def tensors_file(tensors: dict[str, torch.Tensor], key: str, content: object) -> bytes:
    """The content of :func:`write_tensors`' file."""
    text = json.dumps(content)
    tensors = unshared(tensors)
    # One entry: safetensors writes several in any order, and equal runs should give equal files.
    metadata = {key: json.dumps({"sha256": digest(tensors, text), "content": text})}
    return save(tensors, metadata)


def read_tensors(path: Path, key: str) -> tuple[object | None, dict[str, torch.Tensor]]:
    """The content and tensors of :func:`write_tensors`; None and nothing from another's file.

    Raises:
        FileNotFoundError, SafetensorError, ValueError: the file is missing or damaged.
    """
    # Not by safe_open, which takes no path that is not UTF-8.
    content = read_bytes(path)
    tensors = load(content)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = json.loads(header).get("__metadata__") or {}
    if key not in metadata:
        return None, {}
    stored = _parsed(metadata[key])
    if not isinstance(stored, dict) or not isinstance(stored.get("content"), str):
        raise ValueError("its metadata has no checksum")
    if stored.get("sha256") != digest(tensors, stored["content"]):
        raise ValueError("its checksum is not that of its content")
    return _parsed(stored["content"]), tensors


def _parsed(text: str) -> object:
    """What JSON says; a ValueError for what is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, each in memory of its own, as safetensors wants tied weights."""
    seen, result = set(), {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        result[name] = value.clone() if place in seen else value
        seen.add(place)
    return result


def digest(tensors: dict[str, torch.Tensor], text: str) -> str:
    """SHA-256 of ``text`` and of every tensor's name, dtype, shape and bytes."""
    result = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        result.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()
