"""Speed and memory of every operation, layer and module by backend, relative to the reference."""

from dataclasses import replace

import pytest

from bench import checks, kernel_rows
from bench.kernel_rows import DEVICE, DTYPES, MODULES, Row
from bench.minimum_cost import cost
from bench.resources import MIB, can_measure_peak, launches, memory_figures, peak_memory
from bench.rivals import RIVALS
from bench.timing import clock, first_call, take_turns
from bench.workloads import step, workload
from t2t_kernels.measure import copy_ceiling, matmul_ceiling, peak_allocated, saved_bytes


def rows(options) -> list[Row]:
    return kernel_rows.rows(options.batch, options.compiled, options.smoke)


@pytest.mark.benchmark(timer=clock)
def test_kernels(benchmark, row: Row, device_name: str):
    seconds, found = first_call(lambda: checks.results(row), DEVICE)
    checks.check(row, found)
    benchmark.extra_info.update(
        op=row.op,
        size=row.size,
        backend=row.backend,
        device=device_name,
        dtype=row.dtype,
        shape=list(workload(replace(row, backend="reference")).shape),
        **{"pass": row.direction},
    )
    ours = step(row)
    reference = None if row.backend == "reference" else step(replace(row, backend="reference"))
    median = take_turns(benchmark, ours, reference, DEVICE, cold=True)
    trains = row.direction != "forward"
    growth = row.op in MODULES and row.direction == "full" and row.backend not in RIVALS
    benchmark.extra_info.update(memory_figures(row, ours, mib, DEVICE, trains, growth))
    if median is None:
        return
    needed = cost(row)
    benchmark.extra_info.update(
        first_call_seconds=seconds,
        flops=needed.flops,
        minimum_bytes=needed.bytes,
        tflops=needed.flops / median / 1e12,
        gb_per_second=needed.bytes / median / 1e9,
        ceiling_tflops=matmul_ceiling(DEVICE, DTYPES[row.dtype]) / 1e12,
        ceiling_gb_per_second=copy_ceiling(DEVICE) / 1e9,
    )
    if DEVICE.type == "cuda":
        benchmark.extra_info["launches"] = launches(ours, DEVICE)
    elif (
        can_measure_peak(DEVICE)
        and row.direction == "full"
        and row.op.endswith(("_layer", "_module"))
    ):
        benchmark.extra_info["peak_resident_mib"] = peak_memory(step, row, DEVICE) / MIB


def mib(row: Row) -> float:
    """The peak allocation of the row's call on a GPU; on a CPU the memory saved for backward."""
    if DEVICE.type == "cuda":
        return peak_allocated(step(row), DEVICE) / MIB
    ready = workload(row)
    return saved_bytes(ready.forward, ready.leaves) / MIB
