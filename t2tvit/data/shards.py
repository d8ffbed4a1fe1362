"""Images from tar shards in the format of the webdataset library, read sequentially.

The files are not opened by the webdataset library, because it runs or downloads some names.
"""

import io
import itertools
import json
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from PIL import Image

from t2tvit.data.digests import HEAD, digest_of_files
from t2tvit.data.images import extensions, is_ignored, load_image
from t2tvit.errors import InputError, LabelError
from t2tvit.files import read_text

# If a sample has several images, the first of these is used.
IMAGE_KEYS: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
IMAGE_KEYS += tuple(each[1:] for each in extensions() if each[1:] not in IMAGE_KEYS)
LABEL_KEYS = ("cls", "txt", "json")
JSON_LABELS = ("label", "cls")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}
INFO_FILE = "_info.json"  # in the format of timm's datasets
NAMES_FILE = "classes.txt"
MOST_CLASSES = 1_000_000  # if their number follows from the labels
MOST_SHARDS = 1_000_000
MOST_BYTES = 2**30  # of an image; LABEL_BYTES of a label
LABEL_BYTES = 2**20
SAMPLE_BYTES = 2 * tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class ShardSample:
    """An undecoded image. ``place`` is SHARD/KEY, and ``number`` is a hash of it."""

    place: str
    content: bytes
    label: int

    @property
    def number(self) -> int:
        return zlib.crc32(self.place.encode(errors="surrogateescape"))

    def image(self) -> Image.Image:
        """The decoded RGB image; raises an InputError with its place if that fails."""
        return load_image(io.BytesIO(self.content), name=self.place)


class ShardImages:
    """The shards of a split and how many images they hold.

    Args:
        spec: A folder (with train/*.tar and val/*.tar, or *train*.tar and *val*.tar), or a pattern of
            shard names, in which {split} stands for train and val; * and {000..146} are expanded.
        split: "train" or "val".
        num_classes: The number of classes if there is no NAMES_FILE beside the shards; by default
            the largest label plus one.

    Raises:
        InputError: There are no shards, or one cannot be read.
        LabelError: A label is outside the classes. With INFO_FILE and a known number of classes,
            labels are not checked here but in :meth:`read`.
    """

    def __init__(self, spec: str, split: str, num_classes: int | None = None):
        shards, root = find_shards(spec, split)
        names = read_class_names((root or Path(shards[0]).parent) / NAMES_FILE)
        self.names = names or []
        classes = num_classes if names is None else len(names)
        counts = stored_counts(root / INFO_FILE, shards) if root else None
        if counts is None or classes is None:
            counts, largest = self._scan(shards, classes)
            if classes is None:
                classes = 1 + largest
        self.classes = classes
        self.counts = counts
        self.count = sum(counts.values())
        if self.count == 0:
            raise InputError(f"data: the {split} shards of {spec} hold no images")
        self.shards = [shard for shard in shards if counts[shard]]

    @property
    def class_names(self) -> list[str]:
        return self.names or [str(index) for index in range(self.classes)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        raise InputError("data: webdataset is read as a stream; give image files, or other --data")

    def digest(self) -> str:
        root = os.path.commonpath([os.path.dirname(shard) for shard in self.shards])
        counts = [self.counts[shard] for shard in self.shards]
        return digest_of_files(root, self.shards, counts, HEAD)

    def read(self, shard: str) -> Iterator[ShardSample | InputError]:
        """:func:`read_shard` with these classes."""
        return read_shard(shard, self.classes, self.names)

    def _scan(self, shards: list[str], classes: int | None) -> tuple[dict[str, int], int]:
        """The number of samples of each shard, and the largest label, without reading images."""
        counts, largest, problem = dict.fromkeys(shards, 0), 0, None
        for shard in shards:
            for sample in read_shard(shard, classes, self.names, images=False):
                if isinstance(sample, LabelError):
                    raise sample
                if isinstance(sample, InputError):
                    problem = problem or sample
                    continue
                counts[shard] += 1
                largest = max(largest, sample.label)
        if problem is not None and (classes is None or not any(counts.values())):
            raise problem
        return counts, largest


def stored_counts(path: Path, shards: list[str]) -> dict[str, int] | None:
    """The number of images of each shard from INFO_FILE, if there is one."""
    if not path.is_file():
        return None
    try:
        splits = json.loads(read_text(path))["splits"].values()
        lengths = {
            name: length
            for each in splits
            for name, length in zip(each["filenames"], each["shard_lengths"], strict=True)
        }
        counts = {shard: lengths[Path(shard).name] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"data: {path} does not describe its shards ({error!r}); fix or remove it"
        ) from None
    for shard, count in counts.items():
        # A sample has at least two files, each with a header of one block.
        if type(count) is not int or not 0 <= count <= os.path.getsize(shard) // SAMPLE_BYTES:
            raise InputError(
                f"data: {path} has the length {count!r:.40} for {Path(shard).name}, expected a number "
                "of images that fits into the shard; fix or remove it"
            )
    return counts


def read_class_names(path: Path) -> list[str] | None:
    """The class names in order, one per line, if there is such a file."""
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {path} cannot be read ({error}); fix or remove it") from None
    while names and not names[-1]:
        names.pop()
    if not names or "" in names or len(set(names)) < len(names):
        raise InputError(
            f"data: {path} must name each class once, one per line, without empty lines"
        )
    return names


def find_shards(spec: str, split: str) -> tuple[list[str], Path | None]:
    """The sorted paths of a split's shards, and the dataset's folder if ``spec`` is one.

    Existing files and folders are never interpreted as patterns.
    """
    try:
        folder = Path(spec).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise InputError(f"data: {spec}: {error}; give the full path") from None
    is_folder = spec != "" and folder.is_dir()
    if not is_folder and "{split}" not in spec:
        raise InputError(
            f"data: webdataset:{spec} is not a folder; give one, or a pattern with {{split}}"
        )
    for name in SPLIT_NAMES[split]:
        if is_folder:
            here = escape(str(folder))
            found = sorted(glob(f"{here}/{name}/*.tar")) or sorted(glob(f"{here}/*{name}*.tar"))
        else:
            found = expand(str(folder).replace("{split}", name))
        if found:
            return found, folder if is_folder else None
    raise InputError(
        f"data: webdataset:{spec} has no shards for {split}; expected uncompressed .tar files"
    )


def expand(pattern: str) -> list[str]:
    """The paths that match a pattern. The names of existing folders in it are literal."""
    path = Path(pattern)
    if path.is_dir():
        return sorted(glob(f"{escape(pattern)}/*.tar"))
    if path.exists():
        return [pattern]
    folder = next(parent for parent in path.parents if parent.is_dir() or parent == parent.parent)
    prefix = pattern[: len(pattern) - len(str(path.relative_to(folder)))]
    try:
        names = list(itertools.islice(braceexpand(pattern[len(prefix) :]), MOST_SHARDS + 1))
    except ValueError as error:  # braces that are not balanced
        raise InputError(f"data: {pattern}: {error}") from None
    if len(names) > MOST_SHARDS:
        raise InputError(f"data: {pattern} names more than {MOST_SHARDS:,} shards")
    found: list[str] = []
    for name in names:
        exact = Path(prefix + name).exists()
        matching = [prefix + name] if exact else sorted(glob(escape(prefix) + name))
        if not matching and "*" not in name and found:
            raise InputError(f"data: the shard {prefix + name} does not exist")
        found += matching
    return found


def read_shard(
    shard: str, classes: int | None = None, names: Sequence[str] = (), images: bool = True
) -> Iterator[ShardSample | InputError]:
    """The samples of a shard in order; an InputError stands for one without image or label.

    Args:
        shard: The path of an uncompressed tar file.
        classes: The number of classes; a LabelError stands for a sample with a label outside.
        names: The class names that may be used as labels.
        images: If False, ``content`` is empty.

    Raises:
        InputError: The shard is damaged from here on.
    """
    for key, files in grouped(shard, images):
        try:
            yield sample_of(f"{shard}/{key}", files, classes, names)
        except InputError as error:
            yield error


def sample_of(
    place: str, files: dict[str, bytes | None], classes: int | None, names: Sequence[str]
) -> ShardSample:
    """The sample that consists of ``files`` (suffix → content); see :func:`read_shard`."""
    suffix = next((suffix for suffix in IMAGE_KEYS if suffix in files), None)
    given = {key: files[key] or b"" for key in LABEL_KEYS if key in files}
    if suffix is None or not given:
        raise InputError(
            f"data: {place} has {', '.join(files)}; expected an image ({', '.join(IMAGE_KEYS[:4])}, "
            f"…) and its label in {', '.join(LABEL_KEYS)}, with equal names before the last dot"
        )
    content = files[suffix]
    if content is None:
        raise InputError(
            f"data: {place} has an image that is sparse or larger than {MOST_BYTES / 2**30:g} GiB"
        )
    if "cls" in given:
        given = {"cls": given["cls"]}
    labels = [parse_label(label, key, names) for key, label in given.items()]
    label = next((label for label in labels if label is not None), None)
    if label is None:
        key = next(iter(given))
        text = given[key].decode("utf-8", "replace").strip()
        raise InputError(
            f"data: {place} has the label {text[:40]!r} in {key}; expected a class number, or "
            f"a name from a file {NAMES_FILE} beside the shards"
        )
    if not 0 <= label < (classes or MOST_CLASSES):
        count = f"there are {classes} classes" if classes else "--num-classes is not given"
        raise LabelError(
            f"data: {place} has the label {label}, but {count}; expected 0 to "
            f"{(classes or MOST_CLASSES) - 1}"
        )
    return ShardSample(place, content, label)


def parse_label(content: bytes, key: str, names: Sequence[str]) -> int | None:
    """The class number of a label that is a number or a name, or JSON with a label key."""
    value = content.decode("utf-8", "replace").strip()
    if key == "json":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if isinstance(value, dict):
            value = next((value[name] for name in JSON_LABELS if name in value), None)
        if isinstance(value, bool) or not isinstance(value, int | str):
            return None
        value = str(value).strip()
    if re.fullmatch(r"[-+]?[0-9]{1,18}", value):
        return int(value)
    return names.index(value) if value in names else None


def grouped(shard: str, images: bool) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """The key of each sample with its files by suffix in lower case.

    The files of a sample have the same name up to the first dot, as in the webdataset library. If no
    file has the form KEY.SUFFIX, files with the same name up to the last dot are a sample.
    """
    for base, group in itertools.groupby(members(shard, images), lambda item: base_of(item[0])):
        plain: dict[str, bytes | None] = {}
        others: dict[str, dict[str, bytes | None]] = {}
        for stem, run in itertools.groupby(group, lambda item: item[0].rpartition(".")[0]):
            files = plain if stem == base else {}
            for name, content in run:
                suffix = name.rpartition(".")[2].lower()
                if suffix in files:
                    raise InputError(
                        f"data: the shard {shard} has two files {name}; the rest of it is skipped"
                    )
                files[suffix] = content
            if stem == base:
                continue
            whole = any(key in files for key in IMAGE_KEYS) and any(
                key in files for key in LABEL_KEYS
            )
            if whole and not plain:
                yield stem, files
            else:
                others[stem] = dict.fromkeys(files)
        if plain:
            beside: dict[str, bytes | None] = {
                f"{stem[len(base) + 1 :]}.{key}": None for stem in others for key in others[stem]
            }
            yield base, plain | beside
        else:
            yield from others.items()


def base_of(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def members(shard: str, images: bool) -> Iterator[tuple[str, bytes | None]]:
    """Names and contents of a shard's files; only images (with ``images``) and labels are read.

    The content of an image that is too large is None.
    """
    try:
        if not stat.S_ISREG(os.stat(shard).st_mode):
            raise InputError(f"data: the shard {shard} is not a regular file")
        with open(shard, "rb") as file:
            check_uncompressed(shard, file.read(8))
            file.seek(0)
            tar: Any = tarfile.open(fileobj=file, mode="r:")
            for member in tar:
                tar.members = []  # so that tarfile does not keep all of them
                parts = [part for part in member.name.split("/") if part not in (".", "..")]
                if member.isreg() and "." in parts[-1] and not any(map(is_left_out, parts)):
                    yield member.name, content_of(tar, member, images)
            # tarfile treats a damaged header as the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {tar.offset:,}")
    except InputError:
        raise
    except Exception as error:  # a damaged tar file can raise many exceptions
        raise InputError(
            f"data: the shard {shard} cannot be read; the rest of it is skipped ({error})"
        ) from None


def is_left_out(part: str) -> bool:
    """Whether a file or folder is hidden, or metadata of webdataset."""
    return is_ignored(part) or re.match("__.*__", part) is not None


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo, images: bool) -> bytes | None:
    suffix = member.name.rpartition(".")[2].lower()
    if suffix in LABEL_KEYS:
        return _read(tar, member, LABEL_BYTES)
    if suffix not in IMAGE_KEYS:
        return b""
    if member.issparse() or member.size > MOST_BYTES:
        return None
    return _read(tar, member) if images else b""


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int = -1) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # of a regular file
    return file.read(most)


def check_uncompressed(shard: str, start: bytes) -> None:
    """Raise an InputError if the file with this ``start`` is a compressed tar."""
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise InputError(
                f"data: the shard {shard} is compressed with {kind}; decompress it (its images are "
                "compressed already)"
            )
