"""From PIL images to normalised batches: workers deliver uint8, the device does the rest."""

import atexit
import ctypes
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
)
from torchvision.transforms import Compose, RandomCrop, Resize

from t2tvit.data.images import check_header, load_image
from t2tvit.data.sources import FolderImages, Images, Split, TimmImages, open_split
from t2tvit.errors import InputError, LabelError, OneRankError
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.randomness import drawing_from
from t2tvit.training.samples import Sample
from t2tvit.training.stopping import STOP_SIGNALS, end_loaders

if TYPE_CHECKING:
    from t2tvit.data.shards import ShardImages

# Times the input's aspect ratio. The rest of a longer image is far from the centre crop.
LONGEST = 32
CHECK_SECONDS = 10
PR_SET_PDEATHSIG = 1  # Linux sends a process this signal when its parent ends


class _Images(Dataset):
    """A split as uint8 tensors (C, H, W) and labels, optionally renumbered by ``label_map``.

    Random numbers of ``transform`` depend only on ``seed``, ``epoch`` and the image, not on the number
    of workers or on interruptions.
    """

    def __init__(self, split: Split, transform, label_map: list[int] | None = None, seed: int = 0):
        self.images, self.transform, self.label_map = split.images, transform, label_map
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index % len(self.images)]
        if self.label_map is not None:
            label = self.label_map[label]
        with drawing_from(self.seed, self.epoch, index):
            return self.transform(image), label


class TransformedImages(_Images):
    """Images to evaluate."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index)


class TrainingImages(_Images):
    """Images to train on; one that cannot be read is replaced by the next one.

    The ``n``-th repetition of image ``i`` is at index ``n * len(self) + i``.
    """

    def __getitem__(self, index: int) -> Sample:
        problem, started, count = "", time.perf_counter(), len(self)
        repetition, index = divmod(index, count)
        for offset in range(count):
            place = repetition * count + (index + offset) % count
            try:
                image, label = self.read(place)
                return Sample(image, label, problem, index, time.perf_counter() - started)
            except LabelError:
                raise
            except InputError as error:
                problem = problem or str(error)
        raise InputError(f"none of the {count:,} training images can be read: {problem}")


class CentralPart:
    """Crops an image that is far longer than an input of ``size`` (height, width) to its middle.

    Resizing the whole image for the centre crop could need gigabytes. Other images are unchanged.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        limits = (
            LONGEST * image.height * width / height,
            LONGEST * image.width * height / width,
        )
        # An even number of pixels is removed, so that the centre is the same.
        surplus = [2 * max(0, int(side - limit) // 2) for side, limit in zip(image.size, limits)]
        if not any(surplus):
            return image
        left, top = surplus[0] // 2, surplus[1] // 2
        return image.crop((left, top, image.width - left, image.height - top))


class EpochSampler(DistributedSampler):
    """This rank's shuffled indices of an epoch, without the first ``start``."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.start, None)


class RepeatingSampler(RepeatAugSampler):
    """The same, but each image occurs ``repeats`` times in a row over all ranks, each time at an
    index of its own (see :class:`TrainingImages`)."""

    start = 0

    def __init__(self, dataset: Dataset, repeats: int, seed: int, world: World):
        super().__init__(dataset, world.size, world.rank, num_repeats=repeats, selected_round=0)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        for number, index in enumerate(super().__iter__()):
            if number >= self.start:
                repetition = (self.rank + number * self.num_replicas) % self.num_repeats
                yield repetition * len(self.dataset) + index


class Normalize:
    """uint8 batch (B, C, H, W) → float32 on ``device``, normalised, optionally with random erasing."""

    def __init__(
        self,
        mean,
        std,
        device: torch.device,
        random_erasing: float = 0.0,
        channels_last: bool = False,
    ):
        self.device = device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.scale = 1 / (255 * torch.tensor(std, device=device)).view(-1, 1, 1)
        self.shift = -(torch.tensor(mean, device=device) / torch.tensor(std, device=device))
        self.shift = self.shift.view(-1, 1, 1)
        self.erase = None
        if random_erasing:
            self.erase = RandomErasing(random_erasing, mode="pixel", device=device)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.format)
        images = images.float() * self.scale + self.shift
        return images if self.erase is None else self.erase(images)


def train_transform(config: RunConfig, mean: tuple[float, ...]):
    """PIL image → augmented uint8 tensor (C, H, W); erasing and normalisation come later.

    ``mean``, per channel, is the fill colour of ``auto_augment`` policies.
    """
    height, width = config.size
    padded = config.crop_padding is not None
    jitter: Any = config.color_jitter or None  # its type in timm leaves out None
    try:
        transform = create_transform(
            (height, width),
            is_training=True,
            scale=(1, 1) if padded else config.crop_scale,
            ratio=(width / height, width / height) if padded else config.crop_ratio,
            hflip=config.hflip,
            color_jitter=jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=mean,
            normalize=False,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"auto_augment: timm cannot read the policy {config.auto_augment!r} ({error}); "
            "expected one such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original"
        ) from None
    if not padded:
        return transform
    # On an image of the input's size and shape, timm's random crop returns the whole image.
    resize = Resize((height, width), str_to_interp_mode(config.interpolation))
    return Compose([resize, RandomCrop((height, width), padding=config.crop_padding), transform])


def eval_transform(config: RunConfig):
    """PIL image → resized, centre-cropped uint8 tensor (C, H, W)."""
    transform = create_transform(
        config.size,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        normalize=False,
    )
    return Compose([CentralPart(config.size), transform])


@dataclass(frozen=True)
class Data:
    """Training and evaluation data of a run. ``augment`` is ``normalize`` with random erasing.

    ``skipped`` counts files that are not images, by extension.
    """

    split: Split
    train: DataLoader
    held_out: DataLoader
    augment: Normalize
    normalize: Normalize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    held_out_images: int
    skipped: Counter[str]


def open_splits(config: RunConfig, class_names: list[str] | None = None) -> tuple[Split, Split]:
    """The training and the held-out images of ``config.data``.

    ``class_names`` are those of the run to resume, which keeps their order.

    Raises:
        InputError: The images cannot be read.
    """
    opened = partial(open_split, config.data, img_size=config.size, class_names=class_names)
    train = opened("train", num_classes=config.num_classes)
    classes = len(train.class_names) if is_stream(train.images) else config.num_classes
    return train, opened("val", num_classes=classes)


def open_data(config: RunConfig, world: World, splits: tuple[Split, Split]) -> Data:
    """This rank's share of ``splits``, the result of :func:`open_splits`.

    Raises:
        InputError: The data cannot be read, or does not fit the configuration.
    """
    split, held_out = splits
    mean, std = config.statistics(split.mean, split.std)
    train = train_loader(split, config, world)
    try:
        next(iter(train.dataset)) if is_stream(split.images) else train.dataset[0]
    except InputError:
        raise
    except Exception as error:  # an operation of the policy can raise anything
        if config.auto_augment is None:
            raise
        raise InputError(
            f"auto_augment: {config.auto_augment} fails on the images of {config.data} ({error})"
        ) from None
    check_held_out(held_out, world)
    return Data(
        split=split,
        train=train,
        held_out=eval_loader(held_out, config, world),
        augment=Normalize(mean, std, world.device, config.random_erasing, config.channels_last),
        normalize=Normalize(mean, std, world.device, channels_last=config.channels_last),
        mean=mean,
        std=std,
        held_out_images=len(held_out.images),
        skipped=split.skipped + held_out.skipped,
    )


def check_held_out(split: Split, world: World) -> None:
    """Read this rank's held-out images for up to CHECK_SECONDS: first the headers, then the pixels.

    So most runs with a damaged image end before the first epoch and not after it.

    Raises:
        OneRankError: An image cannot be read, or its label is outside the classes.
    """
    end = time.monotonic() + CHECK_SECONDS
    mine = range(world.rank, len(split.images), world.size)
    steps: Iterator[Callable[[], object]]
    if is_stream(split.images):
        from t2tvit.training.streaming import EvaluationStream

        stream = EvaluationStream(split.images, None, None, world)
        steps = (sample.image for sample in stream.samples())
    elif isinstance(split.images, FolderImages):
        paths = [split.images.paths[index] for index in mine]
        steps = (partial(read, path) for read in (check_header, load_image) for path in paths)
    elif isinstance(split.images, TimmImages):
        steps = (partial(split.images.__getitem__, index) for index in mine)
    else:
        return
    try:
        for read in steps:
            read()
            if time.monotonic() > end:
                break
    except InputError as error:
        raise OneRankError(str(error)) from None


def train_loader(split: Split, config: RunConfig, world: World) -> DataLoader:
    """Shuffled batches of this rank's share of the images; call :func:`begin_epoch` first.

    The batches of all ranks together are those of a single process with the same seed.
    """
    if config.accumulate > config.batch_per_process(world.size):
        raise InputError(
            f"accumulate: got {config.accumulate}, expected at most the "
            f"{config.batch_per_process(world.size)} images that a process has per update"
        )
    if config.batch_size > len(split.images):
        raise InputError(
            f"batch_size: got {config.batch_size}, but the data has only {len(split.images)} "
            "training images; lower it"
        )
    mean, _ = config.statistics(split.mean, split.std)
    transform = train_transform(config, mean)
    if is_stream(split.images):
        from t2tvit.training.streaming import TrainingStream

        if config.repeated_augmentation > 1:
            raise InputError(
                f"repeated_augmentation: got {config.repeated_augmentation}, but tar shards support "
                "only 1; remove the option"
            )
        share = config.batch_per_process(world.size)
        dataset = TrainingStream(split.images, transform, share, config.seed, world)
        sampler = None
    else:
        dataset = TrainingImages(split, transform, seed=config.seed)
        sampler = EpochSampler(dataset, world.size, world.rank, seed=config.seed, drop_last=True)
        if config.repeated_augmentation > 1:
            sampler = RepeatingSampler(dataset, config.repeated_augmentation, config.seed, world)
    return DataLoader(
        dataset,
        batch_size=config.batch_per_process(world.size),
        sampler=sampler,
        num_workers=workers_for(split, config.workers),
        pin_memory=world.device.type == "cuda",
        drop_last=True,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # so that restarting an epoch does not draw from the run's generator
    )


def begin_epoch(loader: DataLoader, epoch: int, step: int) -> None:
    """Let a loader of :func:`train_loader` continue after ``step`` batches of ``epoch``."""
    dataset: Any = loader.dataset
    sampler: Any = loader.sampler
    dataset.epoch = epoch
    if isinstance(loader.dataset, IterableDataset):
        dataset.start = step
    else:
        assert loader.batch_size is not None
        sampler.set_epoch(epoch)
        sampler.start = step * loader.batch_size


def is_stream(images: Images) -> "TypeGuard[ShardImages]":
    """Whether the images can only be read sequentially."""
    return hasattr(images, "shards")


def workers_for(split: Split, workers: int) -> int:
    """``workers``, but at most one per CPU, except for a stream, whose order depends on the number."""
    return workers if is_stream(split.images) else min(workers, available_cpus())


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin_worker(worker: int) -> None:
    """Let this loader process ignore signals to stop, and end with its main process.

    A signal to the process group is for the main process, which still needs its workers. PyTorch
    does not detect that the main process was killed while it started workers; such workers would
    hold the lock of the run's folder forever.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if multiprocessing.get_start_method() == "fork":
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)


# Runs before multiprocessing's exit handler, which sends SIGTERM, which workers ignore, and waits forever.
atexit.register(end_loaders)


def eval_loader(
    split: Split,
    config: RunConfig,
    world: World,
    label_map: list[int] | None = None,
) -> DataLoader:
    """This rank's part of the images: all ranks together see each exactly once."""
    transform = eval_transform(config)
    if is_stream(split.images):
        from t2tvit.training.streaming import EvaluationStream

        dataset = EvaluationStream(split.images, transform, label_map, world)
    else:
        dataset = TransformedImages(split, transform, label_map)
        dataset = Subset(dataset, range(world.rank, len(dataset), world.size))
    return DataLoader(
        dataset,
        batch_size=math.ceil(config.batch_size / world.size),
        num_workers=workers_for(split, config.workers),
        pin_memory=world.device.type == "cuda",
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # so that an evaluation does not draw from the run's generator
    )


def batches(loader: DataLoader) -> Iterator[list]:
    """The loader's batches; an InputError is raised without its worker's traceback."""
    try:
        yield from loader
    except InputError as error:
        name = f"{type(error).__name__}: "
        raise OneRankError(str(error).rstrip().rsplit(name, 1)[-1]) from None
