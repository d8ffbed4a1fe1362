"""Finding image files in folders and reading them as 8-bit PIL images, for all commands."""

import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from t2tvit.errors import InputError

# Pillow's names of the supported formats, and their extensions. Other formats of Pillow are excluded
# because they run programs (EPS runs Ghostscript) or hold documents.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
}
MODES = {1: "L", 3: "RGB"}  # of PIL, by the channels that a model takes
# Files of operating systems and file servers, in lower case.
IGNORED = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
IGNORED |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> tuple[str, ...]:
    """The FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def extensions() -> tuple[str, ...]:
    """Extensions of image files, in lower case with their dots."""
    return tuple(extension for name in formats() for extension in FORMATS[name])


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system."""
    return name.startswith(".") or name.lower() in IGNORED


def list_images(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """Paths of the image files in ``folder`` and subfolders, and counts of others by extension.

    Linked folders are followed, except into a parent. Paths are sorted by folder, then by file name.

    Raises:
        InputError: A folder cannot be read.
    """
    paths: list[str] = []
    skipped: Counter[str] = Counter()
    for place, names in sorted(_files_by_folder(str(folder))):
        for name in sorted(names):
            extension = os.path.splitext(name)[1].lower()
            if extension in extensions():
                paths.append(os.path.join(place, name))
            else:
                skipped[extension] += 1
    return paths, skipped


def _files_by_folder(top: str) -> Iterator[tuple[str, list[str]]]:
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        files = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in above:
                continue
            above |= {(status.st_dev, status.st_ino)}
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_ignored(entry.name):
                        continue
                    if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                        waiting.append((entry.path, above))
                    else:
                        files.append(entry.name)
        except OSError as error:
            raise InputError(f"folder {folder} cannot be read: {error.strerror}") from None
        yield folder, files


def list_classes(folder: Path) -> list[str]:
    """Names of the class folders in ``folder``, sorted by number if all are numbers, else by name."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if os.path.isdir(entry.path)]
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror}") from None
    names = [name for name in found if not is_ignored(name)]
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def describe_skipped(skipped: Counter[str]) -> str:
    """``3 files skipped: .heic (2), .txt (1)``; empty if there are none."""
    if not skipped:
        return ""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{extension or 'no extension'} ({count:,})" for extension, count in ordered]
    if len(kinds) > 8:
        kinds[8:] = ["…"]
    total = skipped.total()
    return f"{total:,} file{'s' * (total > 1)} skipped: {', '.join(kinds)}"


def load_image(source: str | Path | BinaryIO, mode: str = "RGB", name: str = "") -> Image.Image:
    """The first image in a file, upright, with 8 bits per channel, as ``mode``.

    Transparency is dropped. 16-bit grey keeps its upper 8 bits; floats must be from 0 to 1.

    Args:
        source: The path of a regular file, or an open file.
        mode: ``"RGB"`` or ``"L"``.
        name: The image's name in errors; by default its path.

    Raises:
        InputError: The image is missing, damaged, too large or in an unsupported format.
    """
    with _opened(source, name or str(source)) as image:
        image.load()
        image.info.pop("transparency", None)  # so that Pillow does not warn when it drops it
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        image = _to_eight_bits(image).convert(mode)
        method = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
        return image if method is None else image.transpose(method)


def check_header(path: str | Path) -> None:
    """Raise the InputError of :func:`load_image` if the file does not have the header of an image."""
    with _opened(path, str(path)):
        pass


@contextmanager
def _opened(source: str | Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """The image, not decoded yet. Errors here and in the block become InputErrors with its name."""
    try:
        if isinstance(source, (str, Path)) and not stat.S_ISREG(os.stat(source).st_mode):
            kind = "a folder" if os.path.isdir(source) else "not a regular file"
            raise InputError(f"image {name} is {kind}; give an image file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and sizes below Pillow's limit
            with Image.open(source, formats=formats()) as image:
                yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {name} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(
            f"image {name} cannot be read (not an image in one of the formats "
            f"{', '.join(formats())}); fix or remove the file"
        ) from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise InputError(
            f"image {name} cannot be read (it has more than {limit:.0f} million pixels); make it "
            "smaller or remove the file"
        ) from None
    except Exception as error:  # each decoder raises its own exceptions
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"image {name} cannot be read ({' '.join(reason.split())}); fix or remove the file"
        ) from None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode that ``convert`` converts correctly to grey and colour."""
    mode = image.mode
    if mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mode == "I":
        if image.format == "TIFF":
            raise ValueError(
                "its pixels are 32-bit integers of unknown range; save it with 8 or 16 bits"
            )
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # of 16 bits
    if mode == "F":
        pixels = np.asarray(image)
        low, high = pixels.min(), pixels.max()
        if not (0 <= low and high <= 1):
            raise ValueError(f"its pixels are floats from {low:g} to {high:g}, expected 0 to 1")
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    if mode == "LAB":
        return _lab_to_rgb().apply(image)
    if mode in ("La", "RGBa"):
        return image.convert(mode.upper())
    return image


@cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")
