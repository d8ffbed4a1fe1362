"""``t2tvit predict``: classes of image files, folders and lists, or of held-out images."""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from t2tvit.data.sources import IMAGENET_STATISTICS, load_image
from t2tvit.errors import InputError
from t2tvit.laboratory.class_names import names_of, read_names, readable
from t2tvit.training import distributed
from t2tvit.training.distributed import World
from t2tvit.training.engine import precision
from t2tvit.training.inference import Trained, describe, held_out, load_trained
from t2tvit.training.pipeline import Normalize, eval_transform, statistics
from t2tvit.training.plots import draw_predictions

MODES = {1: "L", 3: "RGB"}
STDIN = "-"
# Without a terminal, a bar appears after this time and is drawn as often.
SECONDS_BETWEEN_BARS = 30


def predict_command(arguments: argparse.Namespace) -> None:
    """Run ``t2tvit predict`` with its parsed arguments.

    Raises:
        InputError: something the user can fix; of images that cannot be read, after all others.
        BackendUnavailable: the backend asked for cannot run.
    """
    for name in ("top_k", "images"):
        if getattr(arguments, name) < 1:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option}: got {getattr(arguments, name)}, expected at least 1")
    path, config, about = describe(arguments)
    world = distributed.start(config.device)
    try:
        trained = load_trained(path, config, about, world)
        if world.is_main:
            predict(arguments, path, trained, world)
    finally:
        distributed.stop()


def predict(arguments: argparse.Namespace, path: Path, trained: Trained, world: World) -> None:
    """Classify, and print (and draw) the result."""
    config = trained.config
    if arguments.class_names is not None:
        names = read_names(arguments.class_names, trained.model.num_classes)
    else:
        names = names_of(trained.class_names, trained.model.num_classes)
    if arguments.files:
        source = FileImages(gather(arguments.files), trained)
        fallback = (values[: trained.channels] for values in IMAGENET_STATISTICS)
        mean, std = statistics(config, *fallback)
    else:
        source = HeldOutImages(trained, arguments.images, names)
        mean, std = statistics(config, source.split.mean, source.split.std)
    normalize = Normalize(mean, std, world.device)
    width = max(len(title) for title in source.titles)
    predicted, unreadable = {}, []
    for index, shares in classify(trained, source, normalize, world):
        if isinstance(shares, str):
            unreadable.append(shares)
            if arguments.json:
                print(json.dumps(source.record(index) | {"error": shares}), flush=True)
            continue
        ranked = rank(shares, names, arguments.top_k)
        if index < arguments.images:
            predicted[index] = ranked[0]
        if arguments.json:
            predictions = [
                {"class": name, "index": number, "probability": round(share, 6)}
                for name, number, share in ranked
            ]
            record = source.record(index) | {"predictions": predictions}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            row = "  ".join(f"{name} {share:.1%}" for name, _, share in ranked)
            print(f"{source.titles[index]:<{width}}  {row}", flush=True)
    summary = source.summary([name for name, _, _ in predicted.values()])
    if summary is not None and not arguments.json:
        print(summary)
    if arguments.plot is not None and predicted:
        draw(arguments.plot, source, predicted, summary or f"{config.model}, {path}")
        print(f"drawn to {arguments.plot}", file=sys.stderr if arguments.json else sys.stdout)
    if unreadable:
        some = "; ".join(unreadable[:3]) + ("; …" if len(unreadable) > 3 else "")
        counted = f"{len(unreadable)} of {len(source)} images: " if len(source) > 1 else ""
        raise InputError(counted + some)


class FileImages(Dataset):
    """Image files, decoded and prepared where they are asked for."""

    def __init__(self, paths: list[Path], trained: Trained):
        if trained.channels not in MODES:
            raise InputError(
                f"predict reads grey or colour images, not {trained.channels} channels"
            )
        self.paths, self.mode = paths, MODES[trained.channels]
        self.titles = [str(path) for path in paths]
        self.transform = eval_transform(trained.config)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        """The image (C, H, W), uint8, or what is wrong with it."""
        try:
            return self.transform(self.image(index))
        except InputError as error:
            return str(error)

    def image(self, index: int) -> Image.Image:
        return load_image(self.paths[index], self.mode)

    def label(self, index: int) -> None:
        return None

    def record(self, index: int) -> dict:
        return {"file": self.titles[index]}

    def summary(self, predicted: Sequence[str]) -> None:
        return None


class HeldOutImages(Dataset):
    """The same random held-out images of the configured data each time."""

    def __init__(self, trained: Trained, wanted: int, names: list[str] | None):
        self.split, label_map = held_out(trained)
        self.data, self.transform = trained.config.data, eval_transform(trained.config)
        count = len(self.split.images)
        self.drawn = sorted(random.Random(0).sample(range(count), min(wanted, count)))
        self.images, labels = zip(*(self.split.images[index] for index in self.drawn))
        self.labels = [
            name_of(names, label_map[label] if label_map else label) for label in labels
        ]
        self.titles = [
            f"{self.data} {index}, is {name}" for index, name in zip(self.drawn, self.labels)
        ]

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])

    def image(self, index: int) -> Image.Image:
        return self.images[index]

    def label(self, index: int) -> str:
        return self.labels[index]

    def record(self, index: int) -> dict:
        return {"data": self.data, "held_out": self.drawn[index], "label": self.labels[index]}

    def summary(self, predicted: Sequence[str]) -> str:
        right = sum(name == label for name, label in zip(predicted, self.labels))
        return f"{right} of {len(self)} right, drawn at random from the held-out {self.data}"


def gather(given: Sequence[Path]) -> list[Path]:
    """Image files: those named, those in folders below, and those that standard input lists."""
    found = []
    for path in given:
        if str(path) == STDIN:
            found += [Path(line) for line in sys.stdin.read().splitlines() if line.strip()]
        elif path.is_dir():
            known = Image.registered_extensions()
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
            if not inside:
                raise InputError(f"{path}: there are no images in this folder")
            found += inside
        else:
            found.append(path)
    if not found:
        raise InputError("standard input: got no names of images")
    return found


@torch.no_grad()
def classify(
    trained: Trained, source: Dataset, normalize: Normalize, world: World
) -> Iterator[tuple[int, Tensor | str]]:
    """Each image's number with its class probabilities, or with what is wrong with it."""
    config = trained.config
    loader = DataLoader(
        source,
        batch_size=config.batch_size,
        num_workers=config.workers if len(source) > config.batch_size else 0,
        collate_fn=list,
    )
    patience = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_BARS
    bar = tqdm(
        total=len(source),
        unit="image",
        leave=False,
        delay=patience,
        mininterval=patience,
        disable=sys.stdout.isatty(),  # the lines themselves say how far it is
    )
    first = 0
    with bar:
        for items in loader:
            readable_ones = [item for item in items if not isinstance(item, str)]
            shares = iter(())
            if readable_ones:
                with precision(config, world.device):
                    logits = trained.model(normalize(torch.stack(readable_ones)))
                shares = iter(logits.float().softmax(dim=1).cpu())
            for offset, item in enumerate(items):
                yield first + offset, item if isinstance(item, str) else next(shares)
            first += len(items)
            bar.update(len(items))


def rank(shares: Tensor, names: list[str] | None, top_k: int) -> list[tuple[str, int, float]]:
    """The likeliest classes: name, number and probability."""
    values, numbers = shares.topk(min(top_k, len(shares)))
    return [
        (name_of(names, number), number, value)
        for number, value in zip(numbers.tolist(), values.tolist())
    ]


def name_of(names: list[str] | None, index: int) -> str:
    """A class's name, or its number where nobody says one."""
    known = names is not None and index < len(names)
    return readable(names[index]) if known else f"class {index}"


def draw(path: Path, source, predicted: dict[int, tuple[str, int, float]], title: str) -> None:
    draw_predictions(
        [source.image(index) for index in predicted],
        [name for name, _, _ in predicted.values()],
        [share for _, _, share in predicted.values()],
        [source.label(index) for index in predicted],
        title,
        path,
    )
