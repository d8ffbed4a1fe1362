"""``python -m bench.tune``: the launch parameters that are fastest on the GPU it runs on.

Measures the model's layers for every candidate and prints the entries for
``t2t_kernels._triton.TABLES``; nothing is tuned in a user's step. Candidates that do not compile,
for want of shared memory, drop out.
"""

import itertools
from unittest import mock

import torch

from bench.registry import DEVICE, Row, batch_of, sizes
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
    "forward": ("performer_layer", "forward"),
    "backward": ("performer_layer", "full"),
    "attention": ("performer_attention", "full"),
    "softmax": ("transformer_layer", "forward"),
    "softmax_backward": ("token_attention", "full"),
}
REPETITIONS = 5


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
    changed = table._replace(**{field: tuple(pair)})
    with mock.patch.object(_triton, "_table_of", lambda capability: changed):
        try:
            taken = interleave(runs, REPETITIONS, DEVICE, cold=True)
        except Exception as error:  # the compiler's own, of many types
            print(f"  {candidate}: {type(error).__name__}")
            return None
    return sum(percentiles(values)[0] for values in taken.values())


def main() -> None:
    if DEVICE.type != "cuda":
        raise SystemExit("bench.tune: it measures a GPU, and there is none")
    print(torch.cuda.get_device_name(), torch.__version__)
    for (field, served), (is_float32, dtype) in itertools.product(
        SERVES.items(), enumerate(("bf16", "fp32"))
    ):
        print(f"{field}, {dtype}: {served[0]} {served[1]}")
        runs = steps(*served, dtype)
        candidates = SOFTMAX_CANDIDATES if field.startswith("softmax") else CANDIDATES
        times = {candidate: seconds(field, is_float32, candidate, runs) for candidate in candidates}
        times = {candidate: time for candidate, time in times.items() if time is not None}
        for candidate, time in sorted(times.items(), key=lambda item: item[1])[:3]:
            print(f"  {candidate}: {time * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
