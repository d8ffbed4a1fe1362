"""The machinery of the benchmarks, never a time."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import registry, report, test_kernels
from t2t_kernels.measure import interleave, percentiles, saved_bytes

ROOT = Path(__file__).parents[2]


def test_rows_cover_every_operation_and_the_kernel_of_this_machine():
    rows = registry.rows()
    assert {row.op for row in rows} == set(registry.OPERATIONS)
    assert any(row.op == "soft_split" and row.backend == "cpu" for row in rows) or (
        registry.DEVICE.type == "cuda"
    )
    assert len({row.name for row in rows}) == len(rows)


def test_a_wrong_kernel_is_not_timed():
    row = next(row for row in registry.rows() if row.op == "soft_split")
    row = dataclasses.replace(row, backend="sabotaged")
    exact = torch.ones(3, 4, dtype=torch.float64)
    plain = exact.to(registry.DTYPES[row.dtype])
    test_kernels.assert_parity(row, [plain], [plain], [exact])
    with pytest.raises(AssertionError, match="it is not timed"):
        test_kernels.assert_parity(row, [plain * 1.05], [plain], [exact])


def test_a_run_end_to_end(tmp_path, monkeypatch):
    """One row, as a user would run it; then its way into a table."""
    out = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider"]
        + ["-k", "soft_split-L3 and fp32-full", f"--benchmark-json={out}"]
        + ["--benchmark-max-time=0.05", "--benchmark-min-rounds=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    info = [row["extra_info"] for row in json.loads(out.read_text())["benchmarks"]]
    for row in info:
        memory = {"saved_mib_per_image", "peak_mib"} & set(row)
        assert {"op", "backend", "device", "dtype", "shape", "pass"} <= set(row)
        assert len(memory) == 1
        assert row["speedup_vs_reference"] > 0
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    kept = json.loads(report.keep(out).read_text())
    assert "soft_split-L3" in report.table(kept)


def test_readme_table_is_the_one_generated_from_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert report.updated(readme) == readme, "run python -m bench.report"


def test_saved_bytes_counts_storages_once_and_parameters_not_at_all():
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(16, 8, requires_grad=True)
    # exp saves its result once, the product saves x and, apart, the weight.
    saved = saved_bytes(lambda: (x.view(16, 8) @ weight).exp(), [weight])
    assert saved == 4 * (16 * 8 + 16 * 4)


def test_interleave_takes_turns():
    order = []
    functions = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = interleave(functions, 3, torch.device("cpu"), seconds=0.0)
    assert order[-6:] == ["a", "b"] * 3
    assert {len(values) for values in taken.values()} == {3}
    median, low, high = percentiles([3.0, 1.0, 2.0])
    assert low < median == 2.0 < high
