"""The Triton kernels compiled ahead of time for GPUs that need not be here: registers, spills, PTX.

In a process of its own, since the interpreter cannot be left once entered.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
import importlib
kernels = importlib.import_module("t2t_kernels.soft_split.triton")

capability = int(sys.argv[1])
results = {}
for dtype in ("fp32", "bf16", "fp16"):
    common = {"KERNEL": 7, "STRIDE": 4, "PADDING": 2}
    variants = {
        "fwd": (
            kernels.soft_split_fwd_kernel,
            ["p_x", "p_tokens"],
            {"TOKEN_WIDTH": 147, "BLOCK": kernels.SPLIT_BLOCK, **common},
        ),
        "bwd": (
            kernels.soft_split_bwd_kernel,
            ["p_grad", "p_x"],
            {"CHANNELS": 3, "CHANNELS_LAST": True, "BLOCK": kernels.GATHER_BLOCK, **common},
        ),
    }
    for direction, (kernel, pointers, constants) in variants.items():
        signature = {
            name: f"*{dtype}" if name in pointers
            else "constexpr" if name in constants
            else "i32"
            for name in kernel.arg_names
        }
        # What a call at 224x224 specialises to: torch aligns memory, and 16 divides 3136*147.
        aligned = [*pointers, "elements_per_image"]
        attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, signature, constants, attrs)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kernels.WARPS},
        )
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
            ptx.write(compiled.asm["ptx"])
            ptx.flush()
            log = subprocess.run(
                [get_ptxas(capability).path, "-v", "--gpu-name="
                 + re.search(r"\\.target (sm_\\w+)", compiled.asm["ptx"])[1],
                 ptx.name, "-o", "/dev/null"],
                capture_output=True, text=True, check=True,
            ).stderr
        results[f"{direction}-{dtype}"] = {
            "registers": int(re.search(r"Used (\\d+) registers", log)[1]),
            "spills": sum(map(int, re.findall(r"(\\d+) bytes spill", log))),
            "shared": compiled.metadata.shared,
            "widest_store": max(
                (int(v or 1) * int(bits) for v, bits in
                 re.findall(r"st\\.global(?:\\.v(\\d))?\\.b(\\d+)", compiled.asm["ptx"])),
            ),
        }
print(json.dumps(results))
"""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_registers_spills_and_stores(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for kernel, figures in json.loads(done.stdout.splitlines()[-1]).items():
        assert figures["spills"] == 0, f"{kernel}: {figures}"
        # At least half of the threads that a multiprocessor can hold.
        assert figures["registers"] <= 64, f"{kernel}: {figures}"
        assert figures["shared"] == 0, f"{kernel}: {figures}"
        bits = 64 if kernel in ("bwd-bf16", "bwd-fp16") else 128
        assert figures["widest_store"] == bits, f"{kernel}: {figures}"
