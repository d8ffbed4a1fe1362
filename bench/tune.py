"""``python -m bench.tune``: finds the fastest launch parameters on this GPU.

It measures the model's layers for every candidate and prints entries for
``t2t_kernels._triton.TABLES``; nothing is tuned at run time. Candidates that do not compile because of
their shared memory are skipped.
"""

import argparse
import itertools
import time
from typing import Any
from unittest import mock

import torch

from bench.kernel_rows import DEVICE, Row, batch_of, sizes
from bench.workloads import step
from t2t_kernels import _triton
from t2t_kernels._triton import Launch
from t2t_kernels.measure import interleave, percentiles

CANDIDATES = [
    Launch(block_t, warps, stages)
    for block_t, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2, 3))
]
SOFTMAX_CANDIDATES = [
    Launch(block_t, warps, stages, block_s)
    for block_t, warps, stages, block_s in itertools.product(
        (32, 64, 128), (4, 8), (2, 3), (32, 64, 128)
    )
]
# The operation and pass that use each pair of the table.
SERVES = {
    "project": ("performer_layer", "forward"),
    "weight_gradient": ("performer_layer", "full"),
    "map_gradient": ("performer_layer", "full"),
    "attention": ("performer_attention", "full"),
    "tail_backward": ("performer_layer", "full"),
    "softmax": ("transformer_layer", "forward"),
    "softmax_backward": ("token_attention", "full"),
}
REPETITIONS = 5
# The order in a pair.
DTYPES = ("bf16", "fp32")


def steps(op: str, direction: str, dtype: str) -> dict:
    """The model's calls of ``op`` by layer, for the pass ``direction``."""
    return {
        size: step(Row(op, size, batch_of(op), dtype, direction, "triton")) for size in sizes(op)
    }


def seconds(field: str, is_float32: int, candidate: Launch, runs: dict) -> float | None:
    """Median seconds of all ``runs`` with one entry of the table replaced; None if it fails."""
    table = _triton.table(DEVICE)
    pair = list(getattr(table, field))
    pair[is_float32] = candidate
    replaced: dict[str, Any] = {field: tuple(pair)}
    changed = table._replace(**replaced)
    with mock.patch.object(_triton, "_table_of", lambda capability: changed):
        try:
            taken = interleave(runs, REPETITIONS, DEVICE, cold=True)
        except Exception as error:  # the compiler raises many types
            print(f"  {candidate}: {type(error).__name__}")
            return None
    return sum(percentiles(values)[0] for values in taken.values())


def tune(fields: list[str], dtypes: list[str], limit_seconds: float) -> bool:
    """Measure the candidates of every pair; returns whether there was enough time for all."""
    end = time.monotonic() + limit_seconds
    pairs = list(itertools.product(fields, dtypes))
    for done, (field, dtype) in enumerate(pairs):
        served = SERVES[field]
        # Each pair gets an equal share of the remaining time.
        share = time.monotonic() + (end - time.monotonic()) / (len(pairs) - done)
        print(f"{field}, {dtype}: {served[0]} {served[1]}", flush=True)
        runs = steps(*served, dtype)
        candidates = SOFTMAX_CANDIDATES if field.startswith("softmax") else CANDIDATES
        times = {}
        for measured, candidate in enumerate(candidates):
            if time.monotonic() > share:
                print(f"  no time for {len(candidates) - measured} of {len(candidates)} candidates")
                break
            taken = seconds(field, DTYPES.index(dtype), candidate, runs)
            if taken is not None:
                times[candidate] = taken
        for candidate, taken in sorted(times.items(), key=lambda item: item[1])[:3]:
            print(f"  {candidate}: {taken * 1e3:.3f} ms", flush=True)
    return time.monotonic() <= end


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fields",
        nargs="+",
        choices=SERVES,
        default=list(SERVES),
        help="fields of the table (default: all)",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both"
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=540.0,
        metavar="S",
        help="total time, shared equally; skipped candidates are reported (default: 540)",
    )
    arguments = parser.parse_args(argv)
    if DEVICE.type != "cuda":
        parser.error("no CUDA device; this command measures a GPU")
    print(torch.cuda.get_device_name(), torch.__version__)
    return 0 if tune(arguments.fields, arguments.dtypes, arguments.limit_seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
