"""Batches from tar shards. Each shard is read sequentially.

The samples of a worker depend only on the seed, the epoch, and the numbers of ranks and workers, so an
epoch can be resumed at any batch.
"""

import itertools
import random
import time
from collections import deque
from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from t2tvit.data.shards import ShardImages, ShardSample
from t2tvit.errors import InputError, LabelError
from t2tvit.training.distributed import World
from t2tvit.training.randomness import drawing_from
from t2tvit.training.samples import Sample

SHUFFLED = 1000  # undecoded images in a worker's shuffle buffer


def shares(
    images: ShardImages, shards: list[str], reader: int, readers: int
) -> Iterator[ShardSample | InputError]:
    """The samples of ``reader`` of ``readers``: whole shards if there are enough, else every nth image
    of all shards. An error stands for what cannot be read.

    ``shards`` are those of ``images``, in any order."""
    alone = len(shards) >= readers
    for shard in shards[reader::readers] if alone else shards:
        try:
            samples = images.read(shard)
            yield from samples if alone else itertools.islice(samples, reader, None, readers)
        except InputError as error:
            yield error


class TrainingStream(IterableDataset):
    """Shuffled, augmented samples of this rank, from batch ``start`` of ``epoch``.

    Every rank has the same number of batches. A reader with too few images starts its shards again; a
    reader with too many ignores the rest.

    Args:
        images: The shards.
        transform: PIL image → tensor.
        batch_size: Images of this rank per update.
        seed: Seed of order and augmentation.
        world: The processes of the run.
    """

    def __init__(self, images: ShardImages, transform, batch_size: int, seed: int, world: World):
        self.images, self.transform, self.batch_size = images, transform, batch_size
        self.seed, self.world = seed, world
        self.epoch = self.start = 0
        self.steps = len(images) // (batch_size * world.size)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        # The loader takes batches from its workers in turn, starting with the first. The turn of this
        # worker, counted from the start of the epoch:
        turn = (worker + self.start) % workers
        first, end = (
            len(range(turn, step, workers)) * self.batch_size for step in (self.start, self.steps)
        )
        samples = itertools.islice(self._samples(turn, workers), first, None)
        ahead: deque[tuple[int, ShardSample | InputError]] = deque()
        for _ in range(first, end):
            yield self._first_readable(ahead, samples)
            ahead.popleft()

    def _samples(self, turn: int, workers: int) -> Iterator[tuple[int, ShardSample | InputError]]:
        """Endless numbered rounds over this reader's shards, each in another order."""
        reader = self.world.rank * workers + turn
        shards, readers = self.images.shards, self.world.size * workers
        order = random.Random(f"{self.seed} {self.epoch}")
        shards = order.sample(shards, len(shards))
        draw = random.Random(f"{self.seed} {self.epoch} {reader}")
        for number in itertools.count():
            samples = shuffle(SHUFFLED, initial=SHUFFLED, rng=draw)(
                shares(self.images, shards, reader, readers)
            )
            empty = True
            for sample in samples:
                empty = False
                yield number, sample
            if empty:
                raise InputError(f"data: no images for reader {reader + 1} of {readers}")

    def _first_readable(self, ahead: deque, samples: Iterator) -> Sample:
        """The next readable sample. It replaces unreadable ones and is used again in its own place.

        So the position in the epoch does not depend on which samples can be read.
        """
        problem, started = "", time.perf_counter()
        for position in range(len(self.images) + 1):
            if position == len(ahead):
                ahead.append(next(samples))
            number, sample = ahead[position]
            try:
                if isinstance(sample, InputError):
                    raise sample
                image = sample.image()
            except LabelError:
                raise
            except InputError as error:
                problem = problem or str(error)
                continue
            with drawing_from(self.seed, self.epoch, number, sample.number):
                image = self.transform(image)
            seconds = time.perf_counter() - started
            return Sample(image, sample.label, problem, sample.place, seconds)
        count = len(self.images)
        raise InputError(f"none of the {count:,} training images can be read: {problem}")


class EvaluationStream(IterableDataset):
    """Each image of the split once over all ranks and workers."""

    def __init__(self, images: ShardImages, transform, label_map: list[int] | None, world: World):
        self.images, self.transform = images, transform
        self.label_map, self.world = label_map, world

    def samples(self) -> Iterator[ShardSample]:
        """This reader's samples, not decoded. Raises an InputError for an invalid one."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        reader = self.world.rank * workers + worker
        images = self.images
        for sample in shares(images, images.shards, reader, self.world.size * workers):
            if isinstance(sample, InputError):
                raise sample
            yield sample

    def __iter__(self) -> Iterator[tuple]:
        for sample in self.samples():
            label = sample.label
            if self.label_map is not None:
                label = self.label_map[label]
            yield self.transform(sample.image()), label
