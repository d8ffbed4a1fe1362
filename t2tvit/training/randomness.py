"""The random generators of a process: seeding, saving and restoring them."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# The default, because reading the state of a GPU's generator creates a context there.
CPU = torch.device("cpu")


def _numpy_state() -> tuple[str, np.ndarray, int, int, float]:
    state: Any = np.random.get_state()  # its type includes a dict
    return state


def rng_state(device: torch.device = CPU) -> dict:
    """The state of all generators that this process uses; ``device`` is the device it computes on."""
    kind, keys, *rest = _numpy_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict, device: torch.device = CPU) -> None:
    """Restore a :func:`rng_state` on ``device``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def drawing_from(*entropy: int) -> Iterator[None]:
    """A context in which the CPU generators are seeded from ``entropy``; restored afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
