"""Images per second, utilisation and memory of whole models: ours, plain PyTorch and timm's."""

from dataclasses import replace

import pytest
import torch.nn.functional as F

from bench import model_rows
from bench.kernel_rows import DEVICE, DTYPES
from bench.model_rows import ModelRow, batch_of, build, config, step
from bench.resources import (
    MIB,
    can_measure_peak,
    largest_batch,
    launches,
    memory_figures,
    peak_memory,
)
from bench.timing import clock, first_call, take_turns
from t2t_kernels.measure import matmul_ceiling, saved_bytes
from t2tvit.speed import check_parity, flops_per_image

GIB = 2**30


def rows(options) -> list[ModelRow]:
    return model_rows.rows(options.batch, options.compiled, options.smoke)


@pytest.mark.benchmark(timer=clock)
def test_models(benchmark, row: ModelRow, device_name: str, pytestconfig):
    plain = replace(row, backend=row.plain)
    ours = step(row)
    seconds, _ = first_call(ours, DEVICE)
    if row.backend != row.plain:
        check_parity(build(row), build(plain), batch_of(row)[0], config(row))
    benchmark.extra_info.update(
        op=row.model,
        size=str(model_rows.SIZE),
        backend=row.backend,
        device=device_name,
        dtype=row.dtype,
        shape=[row.batch, 3, model_rows.SIZE, model_rows.SIZE],
        **{"pass": row.direction},
    )
    reference = None if row.backend == row.plain else step(plain)
    median = take_turns(benchmark, ours, reference, DEVICE)
    trains = row.direction == "training"
    growth = trains and not row.backend.endswith("-compile")
    benchmark.extra_info.update(memory_figures(row, ours, mib, DEVICE, trains, growth))
    if median is None:
        return
    # Batch normalisation needs at least two images.
    images = batch_of(replace(plain, batch=2))[0]
    flops = row.batch * flops_per_image(build(plain), images, trains)
    ceiling = matmul_ceiling(DEVICE, DTYPES[row.dtype])
    low, high = benchmark.extra_info["seconds_percentiles_20_80"]
    benchmark.extra_info.update(
        first_call_seconds=seconds,
        images_per_second=row.batch / median,
        images_per_second_percentiles_20_80=[row.batch / high, row.batch / low],
        flops=flops,
        tflops=flops / median / 1e12,
        ceiling_tflops=ceiling / 1e12,
        mfu=flops / median / ceiling,
    )
    if DEVICE.type == "cuda":
        benchmark.extra_info["launches"] = launches(ours, DEVICE)
    elif trains and can_measure_peak(DEVICE):
        benchmark.extra_info["peak_resident_mib"] = peak_memory(step, row, DEVICE) / MIB
    budget = pytestconfig.option.memory
    if budget is not None and trains:
        del ours, reference
        benchmark.extra_info.update(
            largest_batch=largest_batch(step, row, int(budget * GIB), DEVICE),
            largest_batch_gib=budget,
            largest_batch_is="found by trial" if DEVICE.type == "cuda" else "extrapolated",
        )


def mib(row: ModelRow) -> float:
    """The peak allocation of a training step on a GPU; on a CPU the memory saved for backward."""
    if DEVICE.type == "cuda":
        return peak_memory(step, row, DEVICE) / MIB
    model, (images, labels) = build(row).train(), batch_of(row)
    with config(row).autocast(DEVICE):
        kept = saved_bytes(lambda: F.cross_entropy(model(images), labels), model.parameters())
    return kept / MIB
