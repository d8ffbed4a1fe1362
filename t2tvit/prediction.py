"""Classifies image files, folders and lists, or held-out images."""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from t2tvit.charts import Prediction, draw_predictions, thumbnail
from t2tvit.class_names import readable
from t2tvit.data.images import MODES, describe_skipped, list_images, load_image
from t2tvit.data.shards import ShardImages
from t2tvit.data.sources import IMAGENET_STATISTICS, FolderImages, Images
from t2tvit.errors import InputError
from t2tvit.terminal import columns, padded, print_json, printable
from t2tvit.training.inference import Trained, held_out
from t2tvit.training.pipeline import Normalize, available_cpus, eval_transform

STDIN = "-"
# Without a terminal, a progress bar appears after this time and is drawn at this interval.
SECONDS_BETWEEN_BARS = 30


@dataclass(frozen=True)
class Output:
    """How predictions are printed and drawn.

    Attributes:
        top_k: Classes to name for each image.
        json: Whether to print JSON lines instead of a table.
        plot: The file to draw to; None to draw nothing.
        images: The maximum number of images to draw.
    """

    top_k: int
    json: bool
    plot: Path | None
    images: int


def predict(
    trained: Trained, source: "Source", names: list[str] | None, output: Output, title: str
) -> None:
    """Classify the images of ``source``, and print (and draw) the result.

    Args:
        trained: The model, on its device.
        source: The images.
        names: The classes; None to number them.
        output: How to print and draw the result.
        title: The plot's title if the source has no summary.

    Raises:
        InputError: Some images cannot be read; it is raised after all others are classified.
    """
    titles = [printable(title) for title in source.titles]
    width = max(map(columns, titles))
    predicted, unreadable = {}, []
    for index, shares in classify(trained, source):
        if isinstance(shares, str):
            unreadable.append(shares)
            if output.json:
                print_json(source.record(index) | {"error": shares})
            continue
        ranked = rank(shares, names, output.top_k)
        predicted[index] = ranked[0]
        if output.json:
            predictions = [
                {"class": name, "index": number, "probability": round(share, 6)}
                for name, number, share in ranked
            ]
            print_json(source.record(index) | {"predictions": predictions})
        else:
            row = "  ".join(f"{printable(name)} {share:.1%}" for name, _, share in ranked)
            print(f"{padded(titles[index], width)}  {row}", flush=True)
    summary = source.summary({index: number for index, (_, number, _) in predicted.items()})
    if summary is not None and not output.json:
        print(printable(summary))
    if output.plot is not None and predicted:
        shown = dict(islice(predicted.items(), output.images))
        title = summary or title
        if len(shown) < len(source):
            title += f", {len(shown)} of {len(source):,} images"
        draw(output.plot, source, shown, title)
        stream = sys.stderr if output.json else sys.stdout
        print(printable(f"drawn to {output.plot}"), file=stream)
    skipped = source.skipped
    if unreadable:
        some = "; ".join(unreadable[:3]) + ("; …" if len(unreadable) > 3 else "")
        counted = f"{len(unreadable)} of {len(source)} images: " if len(source) > 1 else ""
        rest = f"; {describe_skipped(skipped)}" if skipped else ""
        raise InputError(counted + some + rest)
    if skipped:
        print(printable(describe_skipped(skipped)), file=sys.stderr)


def source_of(
    trained: Trained, files: Sequence[Path], count: int, names: list[str] | None
) -> "Source":
    """The images of ``files``; without any, ``count`` held-out images of the configured data."""
    if files:
        return FileImages(*gather(files), trained)
    return HeldOutImages(trained, count, names)


class FileImages(Dataset):
    """Image files, decoded and preprocessed on access."""

    def __init__(self, paths: list[Path], skipped: Counter[str], trained: Trained):
        if trained.channels not in MODES:
            raise InputError(
                f"predict reads grey or colour images, not {trained.channels} channels"
            )
        self.paths, self.mode, self.skipped = paths, MODES[trained.channels], skipped
        known = (values[: trained.channels] for values in IMAGENET_STATISTICS)
        self.mean, self.std = trained.config.statistics(*known)
        self.titles = [str(path) for path in paths]
        self.transform = eval_transform(trained.config)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        """The image (C, H, W), uint8, or the error message if it cannot be read."""
        try:
            return self.transform(self.image(index))
        except InputError as error:
            return str(error)

    def image(self, index: int) -> Image.Image:
        return load_image(self.paths[index], self.mode)

    def name(self, index: int) -> str:
        return self.paths[index].name

    def actual(self, index: int) -> tuple[str, int] | None:
        return None

    def record(self, index: int) -> dict:
        return {"file": self.titles[index]}

    def summary(self, predicted: dict[int, int]) -> None:
        return None


class HeldOutImages(Dataset):
    """A fixed random sample of the held-out images.

    ``files`` has the path of each image, or SHARD/KEY; None if the data has no files.
    """

    skipped: Counter[str] = Counter()

    def __init__(self, trained: Trained, wanted: int, names: list[str] | None):
        split, label_map = held_out(trained)
        self.mean, self.std = trained.config.statistics(split.mean, split.std)
        self.data, self.transform = trained.config.data, eval_transform(trained.config)
        count = len(split.images)
        self.drawn = sorted(random.Random(0).sample(range(count), min(wanted, count)))
        self.images, labels, self.files = zip(*held_out_images(split.images, self.drawn))
        self.numbers = [label_map[label] if label_map else label for label in labels]
        self.labels = [name_of(names, number) for number in self.numbers]
        self.places = [
            file or f"{self.data} {index}" for file, index in zip(self.files, self.drawn)
        ]
        self.titles = [f"{place}, is {label}" for place, label in zip(self.places, self.labels)]

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])

    def image(self, index: int) -> Image.Image:
        return self.images[index]

    def name(self, index: int) -> str:
        return Path(self.places[index]).name

    def caption(self, index: int) -> str:
        """The image's name and class."""
        return f"{self.name(index)}, is {self.labels[index]}"

    def actual(self, index: int) -> tuple[str, int]:
        """The name and the number of the image's class."""
        return self.labels[index], self.numbers[index]

    def record(self, index: int) -> dict:
        place = {"data": self.data, "held_out": self.drawn[index]}
        if self.files[index] is not None:
            place["file"] = self.files[index]
        return place | {"label": self.labels[index]}

    def summary(self, predicted: dict[int, int]) -> str:
        right = sum(number == self.numbers[index] for index, number in predicted.items())
        return f"{right} of {len(predicted)} right, drawn at random from the held-out {self.data}"


Source = FileImages | HeldOutImages


def held_out_images(
    images: Images, drawn: list[int]
) -> Iterator[tuple[Image.Image, int, str | None]]:
    """Each image that is ``drawn``, with its label and its file."""
    if isinstance(images, ShardImages):
        samples = chain.from_iterable(map(images.read, images.shards))
        wanted = set(drawn)
        for index, sample in zip(range(drawn[-1] + 1), samples):
            if index not in wanted:
                continue
            if isinstance(sample, InputError):
                raise sample
            yield sample.image(), sample.label, sample.place
        return
    paths = images.paths if isinstance(images, FolderImages) else None
    for index in drawn:
        image, label = images[index]
        yield image, label, None if paths is None else paths[index]


def gather(given: Sequence[Path]) -> tuple[list[Path], Counter[str]]:
    """Image files: named ones, those in folders and subfolders, and those listed on standard input.

    Other files in the folders are counted by extension.
    """
    named = []
    for path in given:
        if str(path) == STDIN:
            named += [Path(line) for line in sys.stdin.read().splitlines() if line.strip()]
        else:
            named.append(path)
    if not named:
        raise InputError("standard input: got no names of images; write one per line")
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in named:
        if not path.is_dir():
            found.append(path)
            continue
        inside, others = list_images(path)
        if not inside:
            rest = f" ({describe_skipped(others)})" if others else ""
            raise InputError(f"{path}: there are no images in this folder{rest}")
        found += map(Path, inside)
        skipped += others
    return found, skipped


@torch.no_grad()
def classify(trained: Trained, source: Source) -> Iterator[tuple[int, Tensor | str]]:
    """The index of each image with its class probabilities, or with its error message."""
    config, device = trained.config, next(trained.model.parameters()).device
    normalize = Normalize(source.mean, source.std, device)
    loader = DataLoader(
        source,
        batch_size=config.batch_size,
        num_workers=min(config.workers, available_cpus()) if len(source) > config.batch_size else 0,
        collate_fn=list,
    )
    patience = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_BARS
    bar = tqdm(
        total=len(source),
        unit="image",
        leave=False,
        delay=patience,
        mininterval=patience,
        disable=sys.stdout.isatty(),  # the printed lines already show the progress
    )
    first = 0
    with bar:
        for items in loader:
            readable_ones = [item for item in items if not isinstance(item, str)]
            shares = iter(())
            if readable_ones:
                with config.autocast(device):
                    logits = trained.model(normalize(torch.stack(readable_ones)))
                shares = iter(logits.float().softmax(dim=1).cpu())
            for offset, item in enumerate(items):
                yield first + offset, item if isinstance(item, str) else next(shares)
            first += len(items)
            bar.update(len(items))


def rank(shares: Tensor, names: list[str] | None, top_k: int) -> list[tuple[str, int, float]]:
    """The most likely classes: name, number and probability."""
    values, numbers = shares.topk(min(top_k, len(shares)))
    return [
        (name_of(names, number), number, value)
        for number, value in zip(numbers.tolist(), values.tolist())
    ]


def name_of(names: list[str] | None, index: int) -> str:
    """The name of a class, or its number if it has no name."""
    if names is None or index >= len(names):
        return f"class {index}"
    return readable(names[index])


def draw(
    path: Path, source: Source, predicted: dict[int, tuple[str, int, float]], title: str
) -> None:
    predictions = []
    for index, (name, number, share) in predicted.items():
        made = Prediction(thumbnail(source.image(index)), source.name(index), name, share)
        known = source.actual(index)
        if known is not None:
            actual, actual_number = known
            made = replace(made, actual=actual, right=number == actual_number)
        predictions.append(made)
    draw_predictions(predictions, title, path)
