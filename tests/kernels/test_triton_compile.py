"""The Triton kernels compiled ahead of time for GPUs: registers, spills, PTX.

In processes of their own, since the interpreter cannot be left once entered.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        torch.version.cuda is None and torch.version.hip is None,
        reason="a CPU build of torch registers no Triton kernels outside of the interpreter",
    ),
]

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "kernels.md"
# Bytes of shared memory that a block may have; 8.6 and 8.9 launch as 8.0 does, and have 99 KiB.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
DTYPES = ("fp32", "bf16", "fp16")
# The calls of the table in docs/kernels.md.
TABLED = (
    "performer-layer1-bf16",
    "performer-layer2-bf16",
    "project-bf16",
    "transformer-layer1-bf16",
)
# Every fused kernel in bfloat16 on every architecture; the other dtypes, the sizes at their limits, and
# random features of every dtype, on one.
EVERYWHERE = (*TABLED, "attention-bf16", "transformer-layer2-bf16")
CALLS = {
    80: (*EVERYWHERE, "attention-fp32", "transformer-layer1-fp16", "softmax-wide-fp32"),
    90: (
        *EVERYWHERE,
        "softmax-784-fp32",
        "performer-layer2-fp32",
        "performer-layer1-fp16",
        "performer-wide-bf16",
    ),
    120: (*EVERYWHERE, "project-fp16", "softmax-wide-bf16"),
}
LARGEST = {80: "attention-largest-fp32", 120: "performer-largest-bf16"}
# Another dtype of the map on each.
FEATURES = {
    capability: [f"features-{features}-{dtype}" for features in DTYPES]
    for capability, dtype in zip(CALLS, DTYPES, strict=True)
}
# The most bytes, stores and loads, that a kernel may spill: of a model in half types, in float32, and at
# E = 128. Each release of Triton allocates registers in its own way.
MOST_SPILLS = {
    "3.6": {"half": 88, "fp32": 44, "wide": 48},
    "3.8": {"half": 0, "fp32": 100, "wide": 88},
}
# Parts of the names of the kernels that multiply no matrices.
WITHOUT_PRODUCTS = ("fold", "parts", "sum_slots", "combine", "token_scalars")
CASES = [(capability, call) for capability, calls in CALLS.items() for call in calls]


@pytest.fixture(scope="module")
def compiled():
    """By architecture, the compiler's report or error for each call."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    processes = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "tests.support.triton.compiled", str(capability)]
            + [f"soft_split-{dtype}" for dtype in DTYPES]
            + [*calls, *FEATURES[capability], *filter(None, [LARGEST.get(capability)])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for capability, calls in CALLS.items()
    }
    reports = {}
    for capability, process in processes.items():
        output, errors = process.communicate()
        lines = map(json.loads, output.splitlines())
        reports[capability] = {line["call"]: line["kernels"] for line in lines}, errors
    return reports


def kernels(compiled, capability: int, call: str) -> dict[str, dict]:
    calls, errors = compiled[capability]
    assert call in calls, f"not compiled: {errors[-4000:]}"
    return calls[call]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", CALLS)
def test_soft_split(compiled, capability, dtype):
    results = kernels(compiled, capability, f"soft_split-{dtype}")
    assert len(results) == 2
    for kernel, figures in results.items():
        assert figures["spills"] == 0, f"{kernel}: {figures}"
        # At least half of the threads that a multiprocessor can hold.
        assert figures["registers"] <= 64, f"{kernel}: {figures}"
        assert figures["shared"] == 0, f"{kernel}: {figures}"
        bits = 64 if "bwd" in kernel and dtype != "fp32" else 128
        assert figures["widest_store"] == bits, f"{kernel}: {figures}"


def triton_release() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def most_spills(call: str) -> int:
    kind = "wide" if "-wide-" in call else "fp32" if call.endswith("fp32") else "half"
    return MOST_SPILLS.get(triton_release(), MOST_SPILLS["3.8"])[kind]


@pytest.mark.parametrize(
    ("capability", "call"),
    [(version, call) for version, calls in FEATURES.items() for call in calls],
)
def test_random_features_of_every_dtype_compile(compiled, capability, call):
    names = " ".join(kernels(compiled, capability, call))
    for kernel in ("keys", "queries", "bwd_keys", "bwd_queries"):
        assert f"performer_attention_{kernel}_kernel" in names
    assert "performer_layer_attend_kernel" in names and "parts_kernel" in names


@pytest.mark.parametrize(("capability", "call"), LARGEST.items())
def test_the_largest_sizes_fit_the_shared_memory(compiled, capability, call):
    for kernel, figures in kernels(compiled, capability, call).items():
        assert figures["shared"] <= SHARED[capability], f"{kernel}: {figures}"


# In float32 the factors are split, so they pass through registers.
@pytest.mark.parametrize("call", [call for call in CALLS[90] if not call.endswith("fp32")])
def test_wgmma_reads_no_asynchronous_copies_if_triton_does_not_fence_them(compiled, call):
    if triton_release() not in ("3.6", "3.7"):
        pytest.skip("this Triton puts a proxy fence between them")
    for kernel, figures in kernels(compiled, 90, call).items():
        assert not (figures["asynchronous_copies"] and "wgmma" in figures["matrix"]), kernel


@pytest.mark.parametrize(("capability", "call"), CASES)
def test_fused_kernels(compiled, capability, call):
    results = kernels(compiled, capability, call)
    assert len(results) >= 3
    for kernel, figures in results.items():
        assert figures["spills"] <= most_spills(call), f"{kernel}: {figures}"
        assert figures["shared"] <= SHARED[capability], f"{kernel}: {figures}"
        product = not any(name in kernel for name in WITHOUT_PRODUCTS)
        assert bool(figures["matrix"]) == product, f"{kernel}: {figures}"


def documented() -> dict[tuple[int, str, str], str]:
    """The cells of the document's table by architecture, call and kernel."""
    rows = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines()]
    header = next(row for row in rows if row[:2] == ["call", "kernel"])
    versions = [round(float(version) * 10) for version in header[2:]]
    return {
        (version, row[0], row[1].strip("`")): cell
        for row in rows[rows.index(header) + 2 :]
        if len(row) == len(header)
        for version, cell in zip(versions, row[2:], strict=True)
    }


def test_table_has_every_call_and_no_spills():
    table = documented()
    assert {(version, call) for version, call, _ in table} == {
        (version, call) for version in SHARED for call in TABLED
    }
    assert {where: cell for where, cell in table.items() if "spills" in cell} == {}


@pytest.mark.parametrize(
    ("capability", "call"),
    [case for case in CASES if case[1] in TABLED],
)
def test_table_is_what_the_compiler_reports(compiled, capability, call):
    """The table is in docs/kernels.md; ``python -m tests.support.triton.compiled`` prints it."""
    from tests.support.triton.compiled import cell

    version = re.search(r"Triton (\d+\.\d+)", DOCUMENT.read_text())[1]
    if triton_release() != version:
        pytest.skip(f"the table is of Triton {version}, this is {triton_release()}")
    expected = {
        (capability, call, kernel.removesuffix("_kernel")): cell(figures)
        for kernel, figures in kernels(compiled, capability, call).items()
    }
    table = documented()
    assert {where: table.get(where) for where in expected} == expected
