"""How a run speaks: a bar on a terminal, plain lines elsewhere, nothing from other ranks."""

import resource
import sys
import time

import torch
from tqdm import tqdm

from t2tvit.terminal import printable
from t2tvit.training.distributed import World

# Without a terminal, an epoch longer than this says how far it has come.
SECONDS_BETWEEN_LINES = 30


def say(world: World, text: str) -> None:
    """Print a line, on rank 0 only; what ``text`` has of newlines and the like is escaped."""
    if world.is_main:
        print(printable(text), flush=True)


def peak_memory(device: torch.device) -> float:
    """The most memory that has been in use so far, in MiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class Progress:
    """One epoch's steps; None where their number is not known."""

    def __init__(self, title: str, steps: int | None, world: World):
        self.title, self.steps, self.world = title, steps, world
        self.spoken = time.perf_counter()
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
        """``step`` steps are done; ``text`` says how it goes."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        now = time.perf_counter()
        if self.bar.disable and now - self.spoken > SECONDS_BETWEEN_LINES:
            self.spoken = now
            of = "" if self.steps is None else f"/{self.steps}"
            say(self.world, f"{self.title}  step {step}{of}  {text}")
