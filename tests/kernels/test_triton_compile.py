"""The Triton kernels compiled ahead of time for GPUs that need not be here: registers, spills, PTX.

In a process of its own, since the interpreter cannot be left once entered.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        torch.version.cuda is None and torch.version.hip is None,
        reason="a CPU build of torch registers no Triton kernels outside of the interpreter",
    ),
]

# Bytes of shared memory that a block may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# Bytes that a thread may yet spill, stores and loads: no kernel but these at E = 64, and any at 128.
FEW = 64
SPILLS_FEW = ("performer_layer_bwd_split_kernel",)
# The model's calls in bfloat16 on every architecture, in the other dtypes on one each.
CALLS = [
    *(
        (capability, f"{call}-bf16")
        for capability in SHARED
        for call in ("project", "attention", "performer-layer1", "performer-layer2", "performer-wide")
        + ("softmax-3136", "transformer-layer2")
    ),
    (80, "performer-layer1-fp32"),
    (90, "performer-layer2-fp32"),
    (90, "performer-layer1-fp16"),
    (120, "performer-layer2-fp16"),
    (80, "attention-fp32"),
    (120, "attention-wide-fp32"),
    (120, "project-fp16"),
    (90, "softmax-784-fp32"),
    (80, "transformer-layer1-fp16"),
]
ROOT = __file__.rsplit("/tests/", 1)[0]


def compiled(capability: int, *calls: str) -> dict[str, dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", str(capability), *calls],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_soft_split(capability):
    results = compiled(capability, "soft_split-fp32", "soft_split-bf16", "soft_split-fp16")
    assert len(results) == 6
    for kernel, figures in results.items():
        assert figures["spills"] == 0, f"{kernel}: {figures}"
        # At least half of the threads that a multiprocessor can hold.
        assert figures["registers"] <= 64, f"{kernel}: {figures}"
        assert figures["shared"] == 0, f"{kernel}: {figures}"
        bits = 64 if "bwd" in kernel and "fp32" not in kernel else 128
        assert figures["widest_store"] == bits, f"{kernel}: {figures}"


@pytest.mark.parametrize(("capability", "call"), CALLS)
def test_fused_kernels(capability, call):
    results = compiled(capability, call)
    assert len(results) >= 3
    for kernel, figures in results.items():
        name = kernel.split("/")[1]
        most = FEW if name in SPILLS_FEW or "-wide-" in call else 0
        assert figures["spills"] <= most, f"{kernel}: {figures}"
        assert figures["shared"] <= SHARED[capability], f"{kernel}: {figures}"
        product = name.startswith(("soft_split_linear", "performer", "token_attention", "transformer"))
        assert bool(figures["matrix"]) == product, f"{kernel}: {figures}"
