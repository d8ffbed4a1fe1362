"""Registers and memory of the kernels compiled by nvcc, and their occupancy.

``python -m tests.support.cuda.occupancy`` prints the table of ``DOCUMENT``. Registers and static shared
memory are ptxas's; threads and dynamic shared memory are those of real calls, which the host build records
without running them.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

import t2t_kernels  # noqa: F401  declares the operators
from t2t_kernels.backends import OPERATIONS
from tests.support.cuda.build import CUDA_SOURCES, TORCH, build_host_library
from tests.support.kernels.params import performer_params, transformer_params

NVCC = shutil.which("nvcc") or (
    cpp_extension.CUDA_HOME and Path(cpp_extension.CUDA_HOME, "bin/nvcc")
)
# Per architecture: KiB of shared memory and threads of a multiprocessor. All have 65,536 registers.
ARCHITECTURES = {"80": (164, 2048), "90a": (228, 2048), "120": (100, 1536)}
REGISTERS, WARP = 65536, 32
OPTIONS = [
    *("-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *("-Werror", "all-warnings", "-Xptxas", "--warn-on-spills", "-Xptxas", "-v"),
    *("-Xcompiler", "-Wall", "-isystem", str(TORCH / "include")),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The models' sizes.
SIZES = {"E": 64, "m": 32, "M": 64}
# Where the table is.
DOCUMENT = Path(__file__).parents[3] / "docs" / "gpu.md"


def release() -> str:
    """The version of nvcc, on which the figures depend."""
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def kernel_of(demangled: str) -> str | None:
    found = re.search(
        r"(\w+_kernel(?:<[^()]*>)?)\(", demangled.replace("(anonymous namespace)::", "")
    )
    return found and found[1].replace("c10::", "")


def compile_all(cache: Path) -> dict[str, Path]:
    """Per source a folder with ``object.o``, the PTX per architecture and ptxas's ``log``.

    Raises:
        RuntimeError: nvcc warned, failed, or had to spill registers.
    """
    digest = hashlib.sha256(repr((OPTIONS, release(), torch.__version__)).encode())
    for path in sorted(CUDA_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())

    def one(source: Path) -> Path:
        folder = cache / f"nvcc-{source.stem}-{digest.hexdigest()[:16]}"
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            command = [NVCC, "-c", source, *OPTIONS, "-o", Path(unfinished, "object.o")]
            # In one call: what the host's compiler does is the same for all.
            for name in ARCHITECTURES:
                command += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
            command += ["--keep", "--keep-dir", unfinished]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc {source.name}:\n{done.stderr}")
            Path(unfinished, "log").write_text(done.stderr)
            with contextlib.suppress(OSError):  # another process was first
                shutil.copytree(unfinished, folder)
        return folder

    # The longest first, so that no compiler is left alone with it.
    sources = sorted(CUDA_SOURCES.glob("*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        return {s.stem: f for s, f in zip(sources, compilers.map(one, sources), strict=True)}


def resources(folders: dict[str, Path]) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and bytes of static shared memory by kernel and architecture.

    Raises:
        RuntimeError: two sources have different kernels of one name.
    """
    result = {}
    for folder in folders.values():
        log = subprocess.run(
            ["c++filt"],
            input=(folder / "log").read_text(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for entry in log.split("Compiling entry function")[1:]:
            architecture = re.search(r"' for 'sm_(\w+)'", entry)[1]
            registers = int(re.search(r"Used (\d+) registers", entry)[1])
            shared = re.search(r"(\d+) bytes smem", entry)
            key = kernel_of(entry), architecture
            figures = registers, int(shared[1]) if shared else 0
            if result.setdefault(key, figures) != figures:
                raise RuntimeError(f"two kernels are called {key[0]}: {result[key]} and {figures}")
    return result


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that can be resident at a time."""
    shared_kib, most_threads = ARCHITECTURES[architecture]
    warps = -(-threads // WARP)
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256) // warps
    # Each block takes 1 KiB for the system.
    by_shared = shared_kib * 1024 // (-(-(shared + 1024) // 128) * 128)
    blocks = min(
        by_registers, by_shared, most_threads // WARP // warps, 32 if most_threads > 1536 else 24
    )
    return blocks * warps / (most_threads // WARP)


def call_soft_split(ops, x, dtype):
    tokens = ops.soft_split(x, 7, 4, 2)
    ops.soft_split_backward(tokens, 224, 224, 7, 4, 2, True)


def call_project(ops, x, dtype):
    weight, bias = torch.zeros(384, 576, dtype=dtype), torch.zeros(384, dtype=dtype)
    y = ops.soft_split_linear(x, weight, bias, None, None, 3, 2, 1, 1e-5)
    ops.soft_split_linear_backward(y, x, weight, None, None, 3, 2, 1, 1e-5, True)


def call_attention(ops, x, dtype):
    k = torch.zeros(2, 784, 64, dtype=dtype)
    y, *sums = ops.performer_attention(k, k, k, torch.zeros(32, 64), 1e-8)
    ops.performer_attention_backward(y, k, k, k, torch.zeros(32, 64), *sums, 1e-8)


def call_token_attention(ops, x, dtype):
    q = torch.zeros(2, 784, 64, dtype=dtype)
    y, *saved = ops.token_attention(q, q, q, 1.0)
    ops.token_attention_backward(y, q, q, q, *saved, 1.0)


def call_layer(ops, x, dtype, kernel_size=3, stride=2, padding=1):
    params = performer_params(x.shape[1] * kernel_size**2, 64, 32, 64, dtype=dtype)
    rest = (kernel_size, stride, padding, 1e-8, 0.1)
    seed = torch.zeros(1, dtype=torch.int64)
    y, *sums = ops.performer_layer(x, *params, seed, *rest)
    ops.performer_layer_backward(y, x, *params, seed, *sums, *rest, x.shape[1] > 3)


def call_first_layer(ops, x, dtype):
    call_layer(ops, x, dtype, 7, 4, 2)


def call_softmax_layer(ops, x, dtype, kernel_size=3, stride=2, padding=1):
    params = transformer_params(x.shape[1] * kernel_size**2, 64, 64, dtype=dtype)
    rest = (kernel_size, stride, padding, 1.0)
    y, *saved = ops.transformer_layer(x, *params, *rest)
    ops.transformer_layer_backward(y, x, *params, *saved, *rest, x.shape[1] > 3)


def call_first_softmax_layer(ops, x, dtype):
    call_softmax_layer(ops, x, dtype, 7, 4, 2)


# A call of a training step at 224×224 pixels: its operation, its map, and what it calls.
CALLS = {
    "soft split": ("soft_split", (2, 3, 224, 224), call_soft_split),
    "project": ("soft_split_linear", (2, 64, 28, 28), call_project),
    "attention": ("performer_attention", (2, 3, 8, 8), call_attention),
    "token attention": ("token_attention", (2, 3, 8, 8), call_token_attention),
    "layer 1": ("performer_layer", (2, 3, 224, 224), call_first_layer),
    "layer 2": ("performer_layer", (2, 64, 56, 56), call_layer),
    "softmax layer 1": ("transformer_layer", (2, 3, 224, 224), call_first_softmax_layer),
    "softmax layer 2": ("transformer_layer", (2, 64, 56, 56), call_softmax_layer),
}


def launches(cache: Path) -> list[tuple[str, str, int, int]]:
    """Call, kernel, threads and bytes of dynamic shared memory of the real calls' launches."""
    path = build_host_library(cache)
    torch.ops.load_library(path)
    record = ctypes.CDLL(path).simt_record
    record.restype = ctypes.c_char_p
    symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    kernels = {
        int(line.split()[0], 16): kernel_of(line)
        for line in symbols.splitlines()
        if "_kernel<" in line
    }
    result = []
    for dtype_name, dtype in DTYPES.items():
        for name, (operation, shape, call) in CALLS.items():
            if not OPERATIONS[operation].takes("cuda", dtype, **SIZES):
                continue
            x = torch.zeros(shape, dtype=dtype)
            if shape[1] > 3:
                x = x.contiguous(memory_format=torch.channels_last)
            record(ctypes.c_bool(True))
            try:
                call(torch.ops.t2t_cuda, x, dtype)
            finally:
                lines = record(ctypes.c_bool(False)).decode().splitlines()
            for line in lines:
                offset, threads, shared = map(int, line.split())
                entry = (f"{name}, {dtype_name}", kernels[offset], threads, shared)
                if entry not in result:
                    result.append(entry)
    return result


def table(cache: Path) -> str:
    """Markdown: registers and occupancy of every kernel that the real calls launch."""
    figures = resources(compile_all(cache))
    rows = [
        f"| call | kernel | threads | shared KiB | sm_{' | sm_'.join(ARCHITECTURES)} |",
        "|---|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for call, kernel, threads, dynamic in launches(cache):
        cells = []
        for architecture in ARCHITECTURES:
            registers, static = figures[kernel, architecture]
            share = occupancy(architecture, threads, registers, static + dynamic)
            cells.append(f"{registers} / {share:.0%}")
        shared = (static + dynamic) / 1024
        rows.append(f"| {call} | `{kernel}` | {threads} | {shared:.1f} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())))
