"""Compile the Triton kernels ahead of time, as the launchers launch them, for GPUs that are not here.

``python -m tests.kernels.compiled 90 [call ...]`` calls launchers on tensors without storage at the
real shapes (``real_calls``; all of them takes minutes), records the launches, compiles each as the JIT would have and prints what the assembler
reports, as JSON. It needs a process outside of Triton's interpreter.
"""

import contextlib
import io
import json
import re
import sys
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import t2t_kernels  # noqa: F401  registers every launcher's operators
from t2t_kernels import _triton
from tests.kernels.real_calls import CALLS

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}


@contextlib.contextmanager
def recorded(capability: int):
    """The launches inside the block, as (kernel, arguments by name, options)."""
    launches = []

    def run(self, *args, grid, warmup, num_warps=4, num_stages=3, maxnreg=None, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        launches.append((self, arguments, options))

    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", run),
        mock.patch.object(_triton, "_INTERPRETER", _triton.TABLES[capability]),
    ):
        yield launches


def compile_launch(kernel, arguments: dict, options: dict, capability: int) -> dict:
    """Registers, spilled bytes, shared memory and matrix instructions of one launch."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = f"*{TYPES[value.dtype]}", True
        elif kernel.params[index].is_constexpr or value is None or value is True or value is False:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            # As the JIT specialises: ones are constants, multiples of 16 are known to be.
            if value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    # The log of the assembly that would run; one repeated here would not have Triton's options.
    with (
        mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(knobs.compilation, "always_compile", True),
        contextlib.redirect_stdout(io.StringIO()) as output,
    ):
        compiled = triton.compile(source, target=target, options=options)
    log, ptx = output.getvalue(), compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "warps": options["num_warps"],
        "block_t": arguments.get("BLOCK_T"),
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "shared": compiled.metadata.shared,
        "matrix": sorted({name for name in ("wgmma", "mma.sync") if name in ptx}),
        "widest_store": max(
            (int(v or 1) * int(bits) for v, bits in re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)),
            default=0,
        ),
    }


def report(capability: int, names: list[str]) -> dict[str, dict]:
    results = {}
    for name in names or CALLS:
        with recorded(capability) as launches:
            CALLS[name]()
        for launch in launches:
            figures = compile_launch(*launch, capability)
            results[f"{name}/{figures['kernel']}"] = figures
    return results


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]), sys.argv[2:])))
