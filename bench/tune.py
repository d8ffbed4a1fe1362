"""``python -m bench.tune``: the launch parameters that are fastest on the GPU it runs on.

Measures the model's layers for every candidate and prints the entries for
``t2t_kernels._triton.TABLES``; nothing is tuned in a user's step. Candidates that do not compile,
for want of shared memory, drop out.
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
# Which operation and pass each pair of the table serves.
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
# In the order of a pair.
DTYPES = ("bf16", "fp32")


def steps(op: str, direction: str, dtype: str) -> dict:
    """The model's calls of ``op``, by layer: forward alone or with its backward."""
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
        except Exception as error:  # the compiler's own, of many types
            print(f"  {candidate}: {type(error).__name__}")
            return None
    return sum(percentiles(values)[0] for values in taken.values())


def tune(fields: list[str], dtypes: list[str], limit_seconds: float) -> bool:
    """Measure the candidates of every pair; returns whether the time was enough for all of them."""
    end = time.monotonic() + limit_seconds
    pairs = list(itertools.product(fields, dtypes))
    for done, (field, dtype) in enumerate(pairs):
        served = SERVES[field]
        # A pair may take its share of the time that is left.
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
        help="of the table (default: all)",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both"
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=540.0,
        metavar="S",
        help="for everything, shared equally; what is left out is said (default: 540)",
    )
    arguments = parser.parse_args(argv)
    if DEVICE.type != "cuda":
        parser.error("no CUDA device: it measures a GPU")
    print(torch.cuda.get_device_name(), torch.__version__)
    return 0 if tune(arguments.fields, arguments.dtypes, arguments.limit_seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
