"""Images from tar shards as the webdataset library writes them, read from beginning to end."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from PIL import Image
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tarfile_samples

from t2tvit.data.sources import load_image
from t2tvit.errors import InputError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABEL_KEY = "cls"
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}
INFO_FILE = "_info.json"  # as timm's data sets have it


@dataclass(frozen=True)
class ShardSample:
    """An undecoded image; ``place`` is SHARD/KEY, and ``number`` one that it determines."""

    place: str
    content: bytes
    label: int

    @property
    def number(self) -> int:
        return zlib.crc32(self.place.encode())

    def image(self) -> Image.Image:
        """Decoded, as RGB; an InputError that names the place where it cannot be."""
        return load_image(io.BytesIO(self.content), name=self.place)


class ShardImages:
    """The shards of a split and how many images they hold.

    Args:
        spec: a folder (with train/*.tar and val/*.tar, or *train*.tar and *val*.tar), or the names
            of the shards, where {split} stands for train and val; * and {000..146} are understood.
        split: "train" or "val".

    Raises:
        InputError: no shards, or one that cannot be read.
    """

    def __init__(self, spec: str, split: str):
        self.shards, self.root = find_shards(spec, split), Path(spec).expanduser()
        self.count = self._stored_count()
        if self.count is None:
            self.count = sum(count_images(shard) for shard in self.shards)
        if self.count == 0:
            raise InputError(f"data: the {split} shards of {spec} hold no images")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        raise InputError("data: webdataset is read as a stream; name image files, or other --data")

    def num_classes(self) -> int:
        """One more than the largest label; reads all shards."""
        largest = 0
        for shard in self.shards:
            for sample in read_shard(shard):
                if isinstance(sample, InputError):
                    raise sample
                largest = max(largest, sample.label)
        return 1 + largest

    def _stored_count(self) -> int | None:
        """The number of images by the folder's INFO_FILE, if it has one for just these shards."""
        path = self.root / INFO_FILE
        if not path.is_file():
            return None
        try:
            splits = json.loads(path.read_text(encoding="utf-8"))["splits"].values()
            lengths = {
                name: length
                for each in splits
                for name, length in zip(each["filenames"], each["shard_lengths"], strict=True)
            }
            return sum(lengths[Path(shard).name] for shard in self.shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"data: {path} does not describe its shards ({error!r})") from None


def find_shards(spec: str, split: str) -> list[str]:
    """The paths of a split's shards, sorted."""
    folder = Path(spec).expanduser()
    for name in SPLIT_NAMES[split]:
        patterns = [str(folder).replace("{split}", name)]
        if folder.is_dir():
            patterns = [str(folder / name / "*.tar"), str(folder / f"*{name}*.tar")]
        elif "{split}" not in spec:
            raise InputError(
                f"data: webdataset:{spec} is no folder; give one, or names of shards with {{split}}"
            )
        for pattern in patterns:
            found = []
            for path in expand_urls(pattern):
                matching = sorted(glob(path))
                if not matching and "*" not in path and found:
                    raise InputError(f"data: the shard {path} does not exist")
                found += matching
            if found:
                return found
    raise InputError(f"data: webdataset:{spec} has no shards for {split}")


def count_images(shard: str) -> int:
    """Images of a shard, from the tar's headers."""
    try:
        with tarfile.open(shard) as file:
            return sum(member.name.endswith(f".{LABEL_KEY}") for member in file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"data: the shard {shard} cannot be read ({error})") from None


def read_shard(shard: str) -> Iterator[ShardSample | InputError]:
    """The samples of a shard in order; in place of one without image or label, the error.

    Raises:
        InputError: the shard is damaged from here on.
    """
    try:
        for sample in tarfile_samples([{"url": shard}]):
            place = f"{shard}/{sample['__key__']}"
            content = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
            label = sample.get(LABEL_KEY, b"").strip()
            if content is None or not label.isdigit():
                keys = ", ".join(key for key in sample if not key.startswith("__"))
                yield InputError(
                    f"data: {place} has {keys}; expected {LABEL_KEY} with a number and one of "
                    f"{', '.join(IMAGE_KEYS)}"
                )
                continue
            yield ShardSample(place, content, int(label))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"data: the shard {shard} cannot be read, its rest is left out ({error})"
        ) from None
