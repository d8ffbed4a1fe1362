"""Progress of a run on rank 0: a bar on a terminal, else plain lines."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from t2tvit.training.distributed import World
from t2tvit.training.samples import SampleBatch

# The interval of progress lines without a terminal.
SECONDS_BETWEEN_LINES = 30
# The first updates compile, tune and allocate. Then at least this many are timed, for at least this long.
NOT_TIMED, LEAST_TIMED, SECONDS_TIMED = 2, 3, 3.0


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class Progress:
    """Progress over ``steps`` steps; None if their number is not known."""

    def __init__(self, title: str, steps: int | None, world: World):
        self.title, self.steps, self.world = title, steps, world
        self.started = self.spoken = time.perf_counter()
        self.bar = tqdm(
            total=steps,
            desc=title,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not world.is_main or not sys.stderr.isatty(),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, step: int, text: str) -> None:
        """Show that ``step`` steps are done, with ``text``."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        now = time.perf_counter()
        if self.bar.disable and now - self.spoken > SECONDS_BETWEEN_LINES:
            self.spoken = now
            of = "" if self.steps is None else f"/{self.steps}"
            elapsed = duration(now - self.started)
            self.world.say(f"{self.title}  step {step}{of}  {elapsed}  {text}")


class LoaderClock:
    """Measures how long training waits for its loader, and how long workers read images.

    ``images_before`` is the number of images of the epoch that were used before this process began.
    """

    def __init__(self, images_before: int):
        self.images_before = images_before
        self.started = time.perf_counter()
        self.waited = self.reading = 0.0

    def timed(self, batches: Iterable[SampleBatch]) -> Iterator[SampleBatch]:
        """``batches``, with the wait for each of them measured."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            self.reading += batch.seconds.sum().item()
            yield batch
            asked = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.started


class Forecast:
    """Prints once, after the first updates, how long the run will take.

    Args:
        updates: How many are left, with evaluations counted as updates.
        what: Their description, such as "3 epochs".
        runs: The number of such runs, for instance in a comparison.
        world: Rank 0 prints.
    """

    def __init__(self, updates: float, what: str, runs: int, world: World):
        self.updates, self.what, self.runs, self.world = updates, what, runs, world
        self.done, self.started = 0, 0.0
        self.is_due = True

    def after_step(self) -> None:
        """Count an update."""
        self.done += 1
        if self.done == NOT_TIMED:
            self.started = time.perf_counter()
        timed = self.done - NOT_TIMED
        if not self.is_due or timed < LEAST_TIMED:
            return
        seconds = time.perf_counter() - self.started
        if seconds < SECONDS_TIMED:
            return
        self.is_due = False
        each = seconds / timed
        whole = each * self.updates
        runs = (
            "" if self.runs == 1 else f", {duration(whole * self.runs)} for {self.runs} such runs"
        )
        self.world.say(
            f"time      about {duration(whole)} for {self.what}{runs} ({each:.2g} s per update)",
        )


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as "2 h 10 min"."""
    seconds = round(seconds)
    for unit, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= unit:
            rest = seconds % unit // smaller
            return f"{seconds // unit} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{seconds} s"
