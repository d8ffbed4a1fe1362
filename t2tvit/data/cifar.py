"""CIFAR-10 and CIFAR-100 from local files, binary or python version.

The python version is a pickle. No code in it is run: the unpickler below accepts only four names and
replaces each of them, so a file can only yield numbers, bytes, lists and dicts.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2tvit.errors import InputError
from t2tvit.files import check_file, read_bytes

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Variant:
    """File names of a dataset; ``python`` and ``binary`` are the usual names of its folders."""

    title: str
    python: str
    binary: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    meta: str
    meta_names: bytes
    binary_meta: str
    label_bytes: int


VARIANTS = {
    "cifar10": Variant(
        title="CIFAR-10",
        python="cifar-10-batches-py",
        binary="cifar-10-batches-bin",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        labels=b"labels",
        meta="batches.meta",
        meta_names=b"label_names",
        binary_meta="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Variant(
        title="CIFAR-100",
        python="cifar-100-python",
        binary="cifar-100-binary",
        train=("train",),
        test="test",
        labels=b"fine_labels",
        meta="meta",
        meta_names=b"fine_label_names",
        binary_meta="fine_label_names.txt",
        label_bytes=2,  # the coarse label comes first, the fine one is last
    ),
}


def read_cifar(name: str, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, 32, 32, 3) uint8, labels (N,) int64 and class names of ``split``.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        folder: The folder of the files, or its parent.
        split: ``"train"`` or ``"val"`` (the test files).

    Raises:
        InputError: Files are missing, truncated, or have other content.
    """
    variant = VARIANTS[name]
    stems = variant.train if split == "train" else (variant.test,)
    for place in (folder, folder / variant.python, folder / variant.binary):
        if (place / stems[0]).is_file():
            read, files = _read_python, [place / stem for stem in stems]
            names = _unpickle(place / variant.meta).get(variant.meta_names)
            break
        if (place / f"{stems[0]}.bin").is_file():
            read, files = _read_binary, [place / f"{stem}.bin" for stem in stems]
            names = _read(place / variant.binary_meta).split()
            break
    else:
        raise InputError(
            f"data {name}: no {variant.title} files in {folder}; expected {stems[0]} or "
            f"{stems[0]}.bin there or in its {variant.python} or {variant.binary} "
            f"(from https://www.cs.toronto.edu/~kriz/cifar.html), or give {name}:PATH"
        )
    parts = [read(path, variant) for path in files]
    images = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    if not isinstance(names, list) or not all(isinstance(item, bytes) for item in names):
        raise InputError(
            f"data {name}: {files[0].parent} holds no class names; copy the whole folder"
        )
    if labels.size and labels.max() >= len(names):
        raise InputError(
            f"data {name}: a label {labels.max()} in {files[0].parent}, which names only "
            f"{len(names)} classes; the files are damaged or belong to another dataset"
        )
    images = images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels, [item.decode("utf-8", "replace") for item in names]


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; is the dataset complete?"
        ) from None


def _read_binary(path: Path, variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(_read(path), np.uint8)
    record = variant.label_bytes + PIXELS
    if data.size == 0 or data.size % record:
        raise InputError(
            f"{path} is damaged: {data.size} bytes, expected a multiple of {record}; download it again"
        )
    records = data.reshape(-1, record)
    return records[:, variant.label_bytes :], records[:, variant.label_bytes - 1].astype(np.int64)


def _read_python(path: Path, variant: Variant) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(path)
    images, labels = batch.get(b"data"), batch.get(variant.labels)
    if (
        not isinstance(images, _Array)
        or not isinstance(labels, list)
        or not all(isinstance(label, int) and 0 <= label <= 255 for label in labels)
        or not labels
        or images.values.shape != (len(labels), PIXELS)
    ):
        raise InputError(f"{path} is not a batch of {variant.title}; download the dataset again")
    return images.values, np.asarray(labels, np.int64)


def _unpickle(path: Path) -> dict:
    try:
        check_file(path)
        with path.open("rb") as file:
            content = _DataOnly(file, encoding="bytes").load()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; is the dataset complete?"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle fails in many ways
        raise InputError(
            f"{path} is damaged ({error or type(error).__name__}); download it again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a dataset; download it again")
    return content


class _Array:
    """Replaces a NumPy array in a pickle; only arrays of bytes are accepted."""

    values = np.empty(0, np.uint8)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or dtype.name not in (b"u1", "u1") or fortran:
            raise InputError("holds an array that is not of bytes; download the dataset again")
        self.values = np.frombuffer(data, np.uint8).reshape(shape)


class _DType:
    """Replaces a NumPy dtype in a pickle."""

    def __init__(self, name=None, *_):
        self.name = name

    def __setstate__(self, state):
        pass


class _DataOnly(pickle.Unpickler):
    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _DType,
    }

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise InputError(f"refused: the pickle names {module}.{name}, which no CIFAR file does")
        return self.KNOWN[module, name]
