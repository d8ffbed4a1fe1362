"""Sources of images: each one opens a dataset split as PIL images with class indices."""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from t2tvit.data.digests import digest_of_arrays, digest_of_files, digest_of_text
from t2tvit.data.images import extensions, list_classes, list_images, load_image
from t2tvit.errors import InputError, LabelError, unknown_name

# Each source and the channels of its images.
SOURCES = {
    "digits": 1,
    "cifar10": 3,
    "cifar100": 3,
    "imagefolder": 3,
    "webdataset": 3,
    "timm": 3,
    "synthetic": 3,
}

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation over the training images.
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
DIGITS_STATISTICS = ((0.3054,), (0.3760,))

DIGITS = "0123456789"
HELD_OUT_DIGITS = 360
SPLIT_SEED = 0
MOST_SYNTHETIC = 10_000_000
# A dataset on the Hugging Face Hub: never a path, a URL or a local dataset with code.
HUB_NAME = re.compile(r"(?i:hfds)/[A-Za-z0-9]\w*[\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Images(Protocol):
    """``images[i]`` is a PIL image and its class index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    def digest(self) -> str:
        """Equal for equal images, wherever they are; cheap, so it may miss changed pixels in a file."""
        ...


@dataclass(frozen=True)
class Split:
    """Images of a dataset split; :class:`~t2tvit.data.shards.ShardImages` can only be streamed.

    ``mean`` and ``std`` are per channel, of values in [0, 1]. ``skipped`` counts the files of an image
    folder that are not images, by extension.
    """

    images: Images
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def channels(self) -> int:
        return len(self.mean)


def open_split(
    spec: str,
    split: str,
    *,
    img_size: tuple[int, int] = (224, 224),
    num_classes: int | None = None,
    class_names: list[str] | None = None,
) -> Split:
    """The ``"train"`` or ``"val"`` split of ``SOURCE[:PATH]``.

    Args:
        spec: One of :data:`SOURCES`, with its path (or number of images) after a colon.
        img_size: Image size of ``synthetic``.
        num_classes: Number of classes of ``synthetic``, and of ``webdataset``, where a label outside
            is an error.
        class_names: Those of a resumed run. An image folder with the same classes uses this order.

    Raises:
        InputError: The source is unknown, or its files are missing, damaged or do not fit together.
    """
    source, colon, rest = spec.partition(":")
    channels_of(spec)
    if source == "digits":
        classes = rest if colon else DIGITS
        if len(classes) < 2 or len(set(classes)) < len(classes) or not set(classes) <= set(DIGITS):
            raise InputError(
                f"data: got {spec!r}, but digits is built in; write digits, or digits:01234 for some "
                "of its classes"
            )
        return _digits(split, sorted(map(int, classes)))
    if source == "synthetic":
        count = rest or "1024"
        if not re.fullmatch("[0-9]{1,18}", count) or not 4 <= int(count) <= MOST_SYNTHETIC:
            raise InputError(
                f"data: got {spec!r}, expected synthetic:IMAGES with at least 4 images and at most "
                f"{MOST_SYNTHETIC:,}"
            )
        return _synthetic(int(count), split, img_size, num_classes or 1000)
    if source == "imagefolder":
        if not rest:
            raise InputError(
                "data: imagefolder needs a path: imagefolder:PATH with train/ and val/"
            )
        return _image_folder(_folder(rest), split, class_names)
    if source == "webdataset":
        from t2tvit.data.shards import ShardImages

        images = ShardImages(rest, split, num_classes)
        return Split(images, images.class_names, *IMAGENET_STATISTICS)
    if source == "timm":
        return _timm(rest, split, num_classes)
    return _cifar(source, _folder(rest or "data"), split)


def _folder(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise InputError(f"data: {path}: {error}; give the full path") from None


def channels_of(spec: str) -> int:
    """Channels of the images of ``SOURCE[:PATH]``; raises an InputError for an unknown source."""
    source = spec.partition(":")[0]
    if source not in SOURCES:
        raise InputError(f"data: {unknown_name('source', source, SOURCES)}")
    return SOURCES[source]


class ArrayImages:
    """uint8 images (N, H, W) or (N, H, W, 3) with their labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def digest(self) -> str:
        return digest_of_arrays(self.pixels, self.labels.astype(np.int64))


class SyntheticImages:
    """Random images and labels. Image ``i`` depends only on (seed, i)."""

    def __init__(self, count: int, seed: int, img_size: tuple[int, int], num_classes: int):
        self.count, self.seed = count, seed
        self.img_size, self.num_classes = img_size, num_classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, index))
        pixels = random.integers(0, 256, (*self.img_size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), int(random.integers(self.num_classes))

    def digest(self) -> str:
        return digest_of_text(f"{self.count} {self.seed} {self.img_size} {self.num_classes}")


def _digits(split: str, classes: list[int]) -> Split:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        pixels,
        digits.target,
        test_size=HELD_OUT_DIGITS,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    train_pixels, val_pixels, train_labels, val_labels = parts
    pixels, labels = (train_pixels, train_labels) if split == "train" else (val_pixels, val_labels)
    chosen = np.isin(labels, classes)
    images = ArrayImages(pixels[chosen], np.searchsorted(classes, labels[chosen]))
    return Split(images, [str(digit) for digit in classes], *DIGITS_STATISTICS)


def _cifar(name: str, folder: Path, split: str) -> Split:
    from t2tvit.data.cifar import read_cifar

    pixels, labels, class_names = read_cifar(name, folder, split)
    statistics = CIFAR10_STATISTICS if name == "cifar10" else CIFAR100_STATISTICS
    return Split(ArrayImages(pixels, labels), class_names, *statistics)


class TimmImages:
    """The images of a timm dataset as RGB, read by :func:`load_image` if they are files."""

    def __init__(self, images: Any, class_names: list[str]):
        self.images, self.class_names = images, class_names
        if hasattr(images, "loader"):  # a folder of torchvision
            images.loader = load_image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"image {index}"
        try:
            if hasattr(self.images, "reader"):
                file, label, *_ = self.images.reader[index]
                with file:
                    image = load_image(file, name=str(index))
            else:
                image, label = self.images[index]
                image = image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InputError(f"{name} cannot be read ({error})") from None
        classes = len(self.class_names)
        if label is None or not 0 <= int(label) < classes:
            raise LabelError(f"data: {name} has the label {label}, expected 0 to {classes - 1}")
        return image, int(label)

    def digest(self) -> str:
        """A digest of the files or labels that the dataset lists, else of the number of images."""
        if hasattr(self.images, "samples") and hasattr(self.images, "root"):  # image files
            paths, labels = zip(*self.images.samples)
            return digest_of_files(str(self.images.root), paths, labels)
        labels = getattr(self.images, "targets", [len(self.images)])
        return digest_of_arrays(np.asarray(labels, np.int64))


def _timm(name: str, split: str, num_classes: int | None) -> Split:
    from timm.data import create_dataset

    name, _, root = name.partition(":")
    if not name.lower().startswith(("hfds/", "torch/")):  # others stream, or open any address
        raise InputError(
            f"data: got 'timm:{name}', expected a name such as timm:hfds/OWNER/NAME or "
            "timm:torch/NAME:PATH"
        )
    if name.lower().startswith("hfds/") and (
        not HUB_NAME.fullmatch(name) or os.path.exists(name.partition("/")[2])
    ):
        raise InputError(
            f"data: got 'timm:{name}', expected timm:hfds/OWNER/NAME of the Hugging Face Hub, not a URL or "
            "the path of a file or folder"
        )
    wanted = "train" if split == "train" else "validation"
    try:
        images = create_dataset(
            name, root=str(_folder(root)) if root else None, split=wanted, num_classes=num_classes
        )
        len(images)
    except ImportError as error:
        raise InputError(f"data: timm cannot open {name}: {error}") from None
    except (AssertionError, KeyError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"data: timm's {name} has no random access, which an exact resume needs, or is "
            f"unknown ({' '.join(str(error).split())[:200]})"
        ) from None
    except Exception as error:  # depends on the library of the dataset
        raise InputError(
            f"data: timm cannot open {name}, split {wanted}: {' '.join(str(error).split())[:200]}"
        ) from None
    names = _class_names(images) or [str(index) for index in range(num_classes or 0)]
    if not names:
        raise InputError(f"data: timm's {name} does not name its classes; give --num-classes")
    return Split(TimmImages(images, names), names, *IMAGENET_STATISTICS)


def _class_names(images: Any) -> list[str]:
    """The class names of a dataset of timm, torchvision or the Hugging Face Hub, in order."""
    if hasattr(images, "classes"):
        return [str(name) for name in images.classes]
    reader = images.reader
    if getattr(reader, "class_to_idx", None):
        return sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    features = getattr(getattr(reader, "dataset", None), "features", {})
    return list(getattr(features.get("label"), "names", None) or ())


def _synthetic(count: int, split: str, img_size: tuple[int, int], num_classes: int) -> Split:
    count, seed = (count, 0) if split == "train" else (count // 4, 1)
    images = SyntheticImages(count, seed, img_size, num_classes)
    return Split(images, [str(index) for index in range(num_classes)], *IMAGENET_STATISTICS)


class FolderImages:
    """Image files below ``root`` with their labels."""

    def __init__(self, root: str, paths: list[str], labels: list[int]):
        self.root, self.paths, self.labels = root, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.paths[index]), self.labels[index]

    def digest(self) -> str:
        return digest_of_files(self.root, self.paths, self.labels)


def _image_folder(root: Path, split: str, class_names: list[str] | None) -> Split:
    folder = root / split
    if not folder.is_dir():
        raise InputError(
            f"data: {folder} does not exist; imagefolder:PATH expects PATH/train/CLASS/image files "
            "and PATH/val/CLASS/image files"
        )
    classes = list_classes(folder)
    if not classes:
        raise InputError(
            f"data: {folder}: there is no class folder; put images into one folder per class"
        )
    other = root / ("val" if split == "train" else "train")
    if other.is_dir():
        difference = set(list_classes(other)).symmetric_difference(classes)
        if difference:
            raise InputError(
                f"data: {root}/train and {root}/val differ in their class folders: "
                f"{', '.join(sorted(difference)[:5])}; give both the same class folders"
            )
    if class_names is not None and sorted(class_names) == sorted(classes):
        classes = class_names
    paths, labels, empty = [], [], []
    skipped: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found, others = list_images(folder / name)
        if not found:
            empty.append(name)
        paths += found
        labels += len(found) * [label]
        skipped += others
    if empty:
        raise InputError(
            f"data: {folder}: no valid file for the classes {', '.join(empty[:5])}; expected files "
            f"with the extensions {' '.join(extensions())}"
        )
    return Split(FolderImages(str(folder), paths, labels), classes, *IMAGENET_STATISTICS, skipped)
