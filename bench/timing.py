"""Times a row and its reference in turns, and passes the results to pytest-benchmark."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from t2t_kernels.measure import interleave, percentiles

Result = TypeVar("Result")
REPETITIONS = 9
# Seconds per repetition: dozens of calls of a layer on a GPU, one or a few on a CPU.
SECONDS = {"cpu": 0.1, "cuda": 0.02}


class Clock:
    """The timer of pytest-benchmark, which advances by the measured seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


clock = Clock()


def first_call(call: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds of the first call, including compilation, and its result."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def take_turns(
    benchmark,
    step: Callable[[], object],
    reference: Callable[[], object] | None,
    device: torch.device,
    cold: bool = False,
) -> float | None:
    """Time ``step`` and ``reference`` in turns; the figures are added to ``benchmark``.

    Args:
        reference: None if the row is its own reference.
        cold: As in :func:`t2t_kernels.measure.seconds_per_call`.

    Returns:
        Median seconds; None if benchmarks are disabled and the step only runs.
    """
    if not benchmark.enabled:
        benchmark(step)
        return None
    functions = {"row": step} if reference is None else {"reference": reference, "row": step}
    taken = interleave(functions, REPETITIONS, device, SECONDS[device.type], cold)
    median, *spread = percentiles(taken["row"])
    ratio, *ratio_spread = 1.0, 1.0, 1.0
    if reference is not None:
        ratios = [old / new for old, new in zip(taken["reference"], taken["row"], strict=True)]
        ratio, *ratio_spread = percentiles(ratios)
    benchmark.extra_info.update(
        median_seconds=median,
        seconds_percentiles_20_80=spread,
        speedup_vs_reference=ratio,
        speedup_percentiles_20_80=ratio_spread,
    )
    seconds = iter(taken["row"])
    benchmark.pedantic(lambda: clock.advance(next(seconds)), rounds=REPETITIONS)
    return median
