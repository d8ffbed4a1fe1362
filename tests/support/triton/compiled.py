"""Compiles the Triton kernels ahead of time with the launchers' arguments, for other GPUs.

``python -m tests.support.triton.compiled 90 call ...`` calls launchers on tensors without storage at the real
shapes (``real_calls``), records the launches, compiles each as the JIT would have and prints what the
assembler reports, a line of JSON per call. ``python -m tests.support.triton.compiled`` does so for the calls in TABLED and every architecture and prints the table of ``docs/kernels.md``, in minutes. It
needs a process outside of Triton's interpreter.
"""

import contextlib
import functools
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
from tests.support.triton.real_calls import CALLS

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}
# The Performer module and a transformer layer. float16 differs from bfloat16 in conversions alone.
TABLED = [
    "performer-layer1-bf16",
    "performer-layer2-bf16",
    "project-bf16",
    "transformer-layer1-bf16",
]


@contextlib.contextmanager
def recorded(capability: int):
    """A context that records launches as (kernel, arguments by name, options)."""
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
    """Registers, spilled bytes, shared memory and matrix instructions of a launch."""
    signature, constants, aligned = {}, {}, []
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.append(index)
        elif kernel.params[index].is_constexpr or value is None or value is True or value is False:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            # As the JIT specialises: ones are constants, multiples of 16 are known to be.
            if value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(index)
        else:
            signature[name] = "fp32"
    hashable = (tuple(given.items()) for given in (signature, constants, options))
    return _figures(capability, kernel, tuple(aligned), *hashable)


# Many calls launch the same kernel with the same constants.
@functools.cache
def _figures(capability, kernel, aligned, signature, constants, options) -> dict:
    constants, options = dict(constants), dict(options)
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, dict(signature), constants, attributes)
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
        "block_t": constants.get("BLOCK_T"),
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "shared": compiled.metadata.shared,
        "asynchronous_copies": "cp.async" in ptx,
        "matrix": sorted({name for name in ("wgmma", "mma.sync") if name in ptx}),
        "widest_store": max(
            (
                int(v or 1) * int(bits)
                for v, bits in re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
            ),
            default=0,
        ),
    }


def report(capability: int, call: str) -> dict[str, dict]:
    """The figures of the kernels that a call launches, by name; of several launches the worst."""
    with recorded(capability) as launches:
        CALLS[call]()
    figures = [compile_launch(*launch, capability) for launch in launches]
    figures.sort(key=lambda entry: (entry["spills"], entry["registers"]))
    worst = {entry["kernel"]: entry for entry in figures}
    return {kernel.__name__: worst[kernel.__name__] for kernel, *_ in launches}


def cell(figures: dict) -> str:
    """A cell of the table: a kernel on one architecture."""
    text = f"{figures['registers']} / {figures['shared'] / 1024:.0f}"
    if figures["block_t"]:
        text += f" ({figures['warps']}×{figures['block_t']})"
    text += "".join(f" {instruction}" for instruction in figures["matrix"])
    return text + (f", spills {figures['spills']}" if figures["spills"] else "")


def table() -> str:
    """The Markdown table of every call's kernels on every architecture."""
    lines = [
        f"| call | kernel | {' | '.join(f'{version / 10}' for version in _triton.TABLES)} |",
        "|---|---|" + "---|" * len(_triton.TABLES),
    ]
    for call in TABLED:
        columns = [report(version, call) for version in _triton.TABLES]
        for kernel in columns[0]:
            cells = " | ".join(cell(column[kernel]) for column in columns)
            lines.append(f"| {call} | `{kernel.removesuffix('_kernel')}` | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(table())
    for _call in sys.argv[2:]:
        print(json.dumps({"call": _call, "kernels": report(int(sys.argv[1]), _call)}), flush=True)
