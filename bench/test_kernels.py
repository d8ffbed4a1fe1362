"""Speed and memory of every operation, by backend, against the reference in the same process."""

import pytest
import torch

from bench.registry import BATCH, DEVICE, DTYPES, Row, rows, workload
from t2t_kernels.measure import interleave, percentiles, saved_bytes

REPETITIONS = 7
SECONDS = 0.1


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_kernels(benchmark, row: Row):
    call, leaves, shape = workload(row)
    if row.backend != "reference":
        exact_call, exact_leaves, _ = workload(row, exact=True)
        assert_parity(row, results(row, call, leaves, row.backend), results(row, call, leaves),
                      results(row, exact_call, exact_leaves))  # fmt: skip
        del exact_call, exact_leaves

    def run(backend: str) -> None:
        y = call(backend)
        if row.direction == "full":
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        op=row.op,
        backend=row.backend,
        device=device_name(),
        dtype=row.dtype,
        shape=list(shape),
        **{"pass": row.direction},
        **memory(row, call, leaves, run),
    )
    if row.backend == "reference":
        benchmark.extra_info["speedup_vs_reference"] = 1.0
    elif benchmark.enabled:
        functions = {name: (lambda name=name: run(name)) for name in ("reference", row.backend)}
        taken = interleave(functions, REPETITIONS, DEVICE, SECONDS)
        ratios = [old / new for old, new in zip(taken["reference"], taken[row.backend], strict=True)]
        median, low, high = percentiles(ratios)
        benchmark.extra_info.update(
            speedup_vs_reference=median, speedup_percentiles_20_80=[low, high]
        )
    benchmark(run, row.backend)


def results(row: Row, call, leaves, backend: str = "reference") -> list[torch.Tensor]:
    """The result and, for a full pass, the gradients of a fixed random weighting of it."""
    y = call(backend)
    if row.direction == "forward":
        return [y]
    torch.manual_seed(1)
    grad = torch.randn(y.shape, device=y.device).to(DTYPES[row.dtype]).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def assert_parity(row: Row, ours, plain, exact) -> None:
    """No time is taken of a wrong result: one with over twice plain PyTorch's error, and roundings."""
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm()
        allowed += 4 * torch.finfo(DTYPES[row.dtype]).eps * c.norm()
        what = "result" if i == 0 else f"gradient {i - 1}"
        assert error <= allowed, f"{row.name}: {what} is off by {error:.1e}: it is not timed"


def memory(row: Row, call, leaves, run) -> dict[str, float]:
    """Peak allocation of the call on a GPU; elsewhere what is saved for backward, per image."""
    if DEVICE.type == "cuda":
        run(row.backend)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(row.backend)
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    if row.direction == "forward":
        return {"saved_mib_per_image": 0.0}
    return {"saved_mib_per_image": saved_bytes(lambda: call(row.backend), leaves) / 2**20 / BATCH}


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
