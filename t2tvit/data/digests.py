"""Digests of datasets, so that a resumed run can check that it has the same images.

They do not depend on the path of the data, so it may be moved.
"""

import hashlib
import os
import stat
from collections.abc import Iterable

import numpy as np

HEAD = 2**18  # bytes of a shard; different shards often have the same size


def digest_of_files(root: str, paths: Iterable[str], numbers: Iterable[int], head: int = 0) -> str:
    """SHA-256 of each file's path below ``root``, its size, its number and its first ``head`` bytes.

    A number is a label or a count. Only the sizes are read unless ``head`` is given.
    """
    result = hashlib.sha256()
    for path, number in zip(paths, numbers, strict=True):
        size, start = size_and_start(path, head)
        name = os.fsencode(path.removeprefix(root).lstrip(os.sep))
        result.update(b"%s\0%d %d\n" % (name, size, number))
        result.update(start)
    return result.hexdigest()


def size_and_start(path: str, head: int) -> tuple[int, bytes]:
    """A file's size and first ``head`` bytes; (-1, b"") if it is missing or not regular."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return -1, b""
        if head == 0:
            return status.st_size, b""
        with open(path, "rb") as file:
            return status.st_size, file.read(head)
    except OSError:  # reported when the image is read
        return -1, b""


def digest_of_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' shapes and values."""
    result = hashlib.sha256()
    for array in arrays:
        result.update(str(array.shape).encode())
        result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()


def digest_of_text(text: str) -> str:
    """SHA-256 of ``text``."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
