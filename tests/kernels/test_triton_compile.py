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
# Bytes that the largest kernel spills yet; it may not spill more.
KNOWN_SPILLS = {80: 400, 90: 64, 120: 48}
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


@pytest.mark.parametrize(
    "call",
    ["project-bf16", "attention-bf16", "performer-layer1-bf16", "performer-layer2-bf16", "performer-layer2-fp32"]
    + ["softmax-3136-bf16", "softmax-784-fp32", "transformer-layer1-fp16", "transformer-layer2-bf16"],
)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_fused_kernels(capability, call):
    results = compiled(capability, call)
    assert len(results) >= 3
    for kernel, figures in results.items():
        name = kernel.split("/")[1]
        most = KNOWN_SPILLS[capability] if name == "performer_layer_bwd_split_kernel" else 0
        assert figures["spills"] <= most, f"{kernel}: {figures}"
        assert figures["shared"] <= SHARED[capability], f"{kernel}: {figures}"
        product = name.startswith(("soft_split_linear", "performer", "token_attention", "transformer"))
        assert bool(figures["matrix"]) == product, f"{kernel}: {figures}"
