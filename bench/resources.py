"""Measurements of the benchmarks only: launches, peak memory, the largest batch that fits."""

import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from t2t_kernels.measure import peak_allocated

Step = Callable[[], object]
# The largest batch is rounded to a multiple of this.
GRAIN = 8
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def launches(step: Step, device: torch.device) -> int:
    """Kernels, copies and fills that ``step`` launches on a GPU, without profiler annotations."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize(device)
    return sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in recorded.events()
    )


def can_measure_peak(device: torch.device) -> bool:
    """Whether :func:`peak_memory` works here."""
    return device.type == "cuda" or sys.platform == "linux"


def peak_memory(prepare: Callable[..., Step], row, device: torch.device) -> int:
    """Peak bytes of a step of ``row``, beyond its inputs.

    On a GPU, the bytes that PyTorch allocates; on a CPU, the resident memory of a fresh process, which
    can only be measured on Linux (:func:`can_measure_peak`).

    Args:
        prepare: A module-level function that returns the step of ``row``.
        row: A dataclass with a field ``batch``.
    """
    if device.type == "cuda":
        step = prepare(row)
        step()
        return peak_allocated(step, device)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_resident, prepare, row, torch.get_num_threads()).result()


def _peak_resident(prepare: Callable[..., Step], row, threads: int) -> int:
    torch.set_num_threads(threads)
    # Return freed memory to the system at once: cached blocks would make the peak vary.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    # The first call allocates buffers of libraries.
    prepare(replace(row, batch=1))()
    step = prepare(row)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current resident memory
    before = _status("VmRSS")
    for _ in range(2):  # the optimiser's state appears with the first update
        step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def memory_figures(
    row, step: Step, mib: Callable[..., float], device: torch.device, trains: bool, growth: bool
) -> dict:
    """Peak allocation of ``step`` on a GPU; on a CPU the memory saved for backward, per image.

    Args:
        mib: A function that returns the same in MiB for the whole batch of a row.
        trains: Whether the row has a backward.
        growth: Also measure a quarter, a half and all of the batch, as pairs of images and MiB.
    """
    if device.type == "cuda":
        figures: dict = {"peak_mib": peak_allocated(step, device) / MIB}
    else:
        figures = {"saved_mib_per_image": mib(row) / row.batch if trains else 0.0}
    if growth:
        batches = sorted({max(1, row.batch // 4), max(1, row.batch // 2), row.batch})
        figures["memory_mib_by_batch"] = [[n, mib(replace(row, batch=n))] for n in batches]
    return figures


def largest_batch(prepare: Callable[..., Step], row, budget: int, device: torch.device) -> int:
    """Images per training step that fit into ``budget`` bytes, a multiple of 8 (or 0).

    On a GPU it is found by trial: the step runs, or runs out of memory. On a CPU it is extrapolated
    linearly from the peaks of two batches.
    """
    if device.type != "cuda":
        small, large = (
            peak_memory(prepare, replace(row, batch=batch), device)
            for batch in (row.batch, 2 * row.batch)
        )
        return extrapolated(row.batch, small, large, budget)
    total = torch.cuda.get_device_properties(device).total_memory

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        try:
            step = prepare(replace(row, batch=batch))
            for _ in range(2):  # the optimiser's state appears with the first update
                step()
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return False
        finally:
            step = None
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return True

    return bisect(fits, row.batch)


def extrapolated(batch: int, small: int, large: int, budget: int) -> int:
    """The batch that needs ``budget`` bytes if ``batch`` needs ``small`` and twice ``batch`` ``large``.

    Raises:
        ValueError: More images do not need more memory, so extrapolation is not possible.
    """
    per_image = (large - small) / batch
    if per_image <= 0:
        raise ValueError(f"{batch} images take {small} bytes, {2 * batch} take {large}: no slope")
    most = batch + (budget - small) / per_image
    return max(0, int(most // GRAIN) * GRAIN)


def bisect(fits: Callable[[int], bool], start: int) -> int:
    """The largest multiple of 8 that fits, by doubling from ``start`` and then bisection."""
    low, high = 0, max(GRAIN, start // GRAIN * GRAIN)
    while fits(high):
        low, high = high, 2 * high
    while high - low > GRAIN:
        middle = (low + high) // (2 * GRAIN) * GRAIN
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
