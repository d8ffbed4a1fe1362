"""How this project measures: speed in turns, and memory as autograd keeps it.

Times of functions that are compared come from one process and alternate, so that drift of the
machine meets all alike; what is reported is the median with the 20th and 80th percentile.
"""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SECONDS_PER_REPETITION = 0.3


def interleave(
    functions: dict[str, Callable[[], object]],
    repetitions: int,
    device: torch.device,
    seconds: float = SECONDS_PER_REPETITION,
) -> dict[str, list[float]]:
    """Seconds per call of each function, ``repetitions`` of each, measured in turns.

    A repetition calls its function as often as fits into about ``seconds``.
    """

    def measure(function: Callable[[], object], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count

    counts = {}
    for name, function in functions.items():
        measure(function, 2)  # warm-up: compilation, allocation
        counts[name] = max(1, round(seconds / measure(function, 2)))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            taken[name].append(measure(function, counts[name]))
    return taken


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def saved_bytes(forward: Callable[[], object], apart: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of ``forward()``.

    Each storage counts once, whole, however many tensors view it; those of ``apart`` (parameters,
    which are there anyway) do not count.
    """
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        # By the storage itself, since fake tensors have no address; kept alive, so that none counts twice.
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    others = {tensor.untyped_storage()._cdata for tensor in apart}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in others)
