"""Files of tensors with a description and a checksum, in the .safetensors format."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from t2tvit.files import read_bytes, write_atomically


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str, content: object) -> None:
    """Write a .safetensors file whose metadata has ``content`` and a checksum of all under ``key``.

    Raises:
        RunError: The disk is full, or the folder cannot be written to.
    """
    # Serialise in memory first, so that write_atomically reports a full disk.
    write_atomically(path, tensors_file(tensors, key, content))


def tensors_file(tensors: dict[str, torch.Tensor], key: str, content: object) -> bytes:
    """The bytes of the file of :func:`write_tensors`."""
    text = json.dumps(content)
    tensors = unshared(tensors)
    # One entry: safetensors writes several in random order, and equal runs should give equal files.
    metadata = {key: json.dumps({"sha256": digest(tensors, text), "content": text})}
    return save(tensors, metadata)


def read_tensors(path: Path, key: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The content and tensors of a file of :func:`write_tensors`; None and {} for another file.

    Raises:
        FileNotFoundError, SafetensorError, ValueError: The file is missing or damaged.
    """
    # Not by safe_open, which only accepts UTF-8 paths.
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
        raise ValueError("its checksum does not match its content")
    return _parsed(stored["content"]), tensors


def _parsed(text: str) -> Any:
    """Parse JSON; raises a ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors without shared memory: safetensors does not support tied weights."""
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
        result.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
