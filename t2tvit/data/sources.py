"""Where images come from: each source gives a split as PIL images with class indices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from t2tvit.errors import InputError, unknown_name

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


@dataclass(frozen=True)
class Split:
    """Images of one split, ``images[i]`` being a PIL image and its class index.

    Of :class:`~t2tvit.data.shards.ShardImages` there is a stream instead.

    ``mean`` and ``std`` are per channel, of values in [0, 1].
    """

    images: Sequence[tuple[Image.Image, int]]
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)


def open_split(
    spec: str, split: str, *, img_size: tuple[int, int] = (224, 224), num_classes: int | None = None
) -> Split:
    """The ``"train"`` or ``"val"`` split of ``SOURCE[:PATH]``.

    Args:
        spec: one of :data:`SOURCES`, with its path (or count of images) after a colon.
        img_size, num_classes: what ``synthetic`` makes up.

    Raises:
        InputError: an unknown source, or one whose files are missing, damaged or mismatched.
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
        if not count.isdecimal() or int(count) < 4:
            raise InputError(
                f"data: got {spec!r}, expected synthetic:IMAGES with at least 4 images"
            )
        return _synthetic(int(count), split, img_size, num_classes or 1000)
    if source == "imagefolder":
        if not rest:
            raise InputError(
                "data: imagefolder needs a path: imagefolder:PATH with train/ and val/"
            )
        return _image_folder(_folder(rest), split)
    if source == "webdataset":
        from t2tvit.data.shards import ShardImages

        images = ShardImages(rest, split)
        classes = [str(index) for index in range(num_classes or images.num_classes())]
        return Split(images, classes, *IMAGENET_STATISTICS)
    if source == "timm":
        return _timm(rest, split, num_classes)
    return _cifar(source, _folder(rest or "data"), split)


def _folder(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~name of a user whom the system does not know
        raise InputError(f"data: {path}: {error}; write the folder out") from None


def channels_of(spec: str) -> int:
    """Channels of the images of ``SOURCE[:PATH]``; an InputError for an unknown source."""
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


class SyntheticImages:
    """Noise and random labels, the same for every reader: image ``i`` comes from (seed, i)."""

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
    pixels, labels = (
        (train_pixels, train_labels) if split == "train" else (val_pixels, val_labels)
    )
    chosen = np.isin(labels, classes)
    images = ArrayImages(pixels[chosen], np.searchsorted(classes, labels[chosen]))
    return Split(images, [str(digit) for digit in classes], *DIGITS_STATISTICS)


def _cifar(name: str, folder: Path, split: str) -> Split:
    from t2tvit.data.cifar import read_cifar

    pixels, labels, class_names = read_cifar(name, folder, split)
    statistics = CIFAR10_STATISTICS if name == "cifar10" else CIFAR100_STATISTICS
    return Split(ArrayImages(pixels, labels), class_names, *statistics)


class ColourImages:
    """The images of another data set as RGB."""

    def __init__(self, images: Sequence):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.images[index]
            return image.convert("RGB"), int(label)
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"image {index} cannot be read ({error})") from None


def _timm(name: str, split: str, num_classes: int | None) -> Split:
    from timm.data import create_dataset

    name, _, root = name.partition(":")
    if "/" not in name:
        raise InputError(f"data: got 'timm:{name}', expected a name such as timm:hfds/OWNER/NAME")
    wanted = "train" if split == "train" else "validation"
    try:
        images = create_dataset(
            name, root=str(_folder(root)) if root else None, split=wanted, num_classes=num_classes
        )
        len(images)
        images[0]
    except ImportError as error:
        raise InputError(f"data: timm cannot open {name}: {error}") from None
    except (AssertionError, KeyError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"data: timm's {name} has no random access, which an exact resume needs, or is "
            f"unknown ({' '.join(str(error).split())[:200]})"
        ) from None
    except Exception as error:  # whatever the data set's own library raises
        raise InputError(
            f"data: timm cannot open {name}, split {wanted}: {' '.join(str(error).split())[:200]}"
        ) from None
    names = _class_names(images) or [str(index) for index in range(num_classes or 0)]
    if not names:
        raise InputError(f"data: timm's {name} does not name its classes; give --num-classes")
    return Split(ColourImages(images), names, *IMAGENET_STATISTICS)


def _class_names(images: Sequence) -> list[str]:
    """What a data set of timm, torchvision or the Hugging Face hub calls its classes, in order."""
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


def _image_folder(root: Path, split: str) -> Split:
    from torchvision.datasets import ImageFolder

    folder = root / split
    if not folder.is_dir():
        raise InputError(
            f"data: {folder} does not exist; imagefolder:PATH expects PATH/train/CLASS/image files "
            "and PATH/val/CLASS/image files"
        )
    try:
        images = ImageFolder(str(folder), loader=load_image)
    except FileNotFoundError as error:
        raise InputError(f"data: {folder}: {error}; put images into one folder per class") from None
    other = root / ("val" if split == "train" else "train")
    if other.is_dir():
        others = {path.name for path in other.iterdir() if path.is_dir()}
        difference = others.symmetric_difference(images.classes)
        if difference:
            raise InputError(
                f"data: {root}/train and {root}/val differ in their class folders: "
                f"{', '.join(sorted(difference)[:5])}; give both the same"
            )
    return Split(images, images.classes, *IMAGENET_STATISTICS)


def load_image(path: str | Path | BinaryIO, mode: str = "RGB", name: str = "") -> Image.Image:
    """The image in a file as ``mode``; an InputError with its name where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise InputError(f"image {name or path} does not exist") from None
    except Exception as error:  # each decoder fails in ways of its own
        raise InputError(
            f"image {name or path} cannot be read ({error}); mend or remove the file"
        ) from None
