"""Measurements: interleaved times, memory saved by autograd, ceilings of the device.

Functions to compare are timed in turns in one process, so that changes of the machine's speed affect all
of them equally. Results are reported as the median with the 20th and 80th percentile.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

SECONDS_PER_REPETITION = 0.3
# How long a GPU sleeps before a call, so that all of its launches are queued when it starts.
LEAST_HOLD_SECONDS, MOST_HOLD_SECONDS = 2e-3, 20e-3
# The maximum clock rate of a GPU, so that it sleeps at least as long as requested.
CYCLES_PER_SECOND = 2e9
CEILING_REPETITIONS = 5


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    device: torch.device,
    seconds: float = SECONDS_PER_REPETITION,
    cold: bool = False,
    after_each: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of each function, ``repetitions`` of each, measured in turns.

    A repetition calls its function repeatedly for about ``seconds``. ``cold`` is described in
    :func:`seconds_per_call`. ``after_each`` is called after each repetition of a function.
    """
    counts = {}
    for name, function in functions.items():
        seconds_per_call(function, 2, device, cold)  # warm-up: compilation, allocation
        started = time.perf_counter()
        seconds_per_call(function, 2, device, cold)
        # On a GPU, this includes the time for which the GPU is held back.
        counts[name] = max(1, round(seconds * 2 / (time.perf_counter() - started)))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            taken[name].append(seconds_per_call(function, counts[name], device, cold))
            after_each()
    return taken


def seconds_per_call(
    function: Callable[[], object], count: int, device: torch.device, cold: bool = False
) -> float:
    """Mean seconds of ``count`` calls. On a GPU, times are measured on the device.

    A GPU is held back while the host launches the call. Otherwise the time of a short call would be
    that of its launches. ``cold`` empties the L2 cache before each call, so that the previous call does
    not leave data there.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - started) / count
    spans, launching = [], 0.0
    for _ in range(count):
        hold = min(max(LEAST_HOLD_SECONDS, 2 * launching), MOST_HOLD_SECONDS)
        torch.cuda._sleep(int(hold * CYCLES_PER_SECOND))
        if cold:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            torch.empty(size, dtype=torch.int8, device=device).zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        begin.record()
        function()
        end.record()
        launching = time.perf_counter() - started
        spans.append((begin, end))
    torch.cuda.synchronize(device)
    return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 / count


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def saved_bytes(forward: Callable[[], object], apart: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward of ``forward()``.

    Each storage counts once as a whole, even if several tensors share it. The storages of ``apart``
    (parameters, which are in memory anyway) do not count.
    """
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        # Identified by the storage, because fake tensors have no address. It is kept alive, so that its
        # identity is not reused.
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    others = {tensor.untyped_storage()._cdata for tensor in apart}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in others)


def peak_allocated(function: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that ``function`` allocates on a GPU, beyond those allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@functools.lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    side = {"cuda": 8192, "cpu": 2048}[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = interleave({"product": lambda: a @ b}, CEILING_REPETITIONS, device, seconds=0.1)
    return 2 * side**3 / percentiles(taken["product"])[0]


@functools.lru_cache
def copy_ceiling(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    size = {"cuda": 2**31, "cpu": 2**28}[device.type]
    a, b = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    taken = interleave({"copy": lambda: b.copy_(a)}, CEILING_REPETITIONS, device, seconds=0.1)
    return 2 * size / percentiles(taken["copy"])[0]
