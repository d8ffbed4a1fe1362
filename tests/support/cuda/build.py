"""Builds CUDA sources as plain C++ that runs on the CPU; see ``tests/simt/simt.cpp``."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).parents[3]
# The runtime and the stand-ins for headers of CUDA.
SIMT = ROOT / "tests" / "simt"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
TORCH = Path(torch.__path__[0])

COMPILER = [
    *os.environ.get("CXX", "c++").split(),
    "-std=c++20",
    "-O1",
    "-fPIC",
    # The kernels look at the same shared memory as elements and as vectors, as they may in CUDA.
    "-fno-strict-aliasing",
    # Threads are left and resumed by longjmp, which its checks would forbid.
    "-U_FORTIFY_SOURCE",
    # Several such libraries live in one process; each keeps its own runtime.
    "-fvisibility=hidden",
    # simt.cpp reports it, in place of the sanitiser's library.
    "-fsanitize=alignment",
    "-DT2T_CUDA_ON_CPU",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{SIMT / 'include'}",
    f"-isystem{TORCH / 'include'}",
]
LINKER = ["-shared", f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu"]


# What nvcc defines where it compiles for Hopper's own instructions.
HOPPER = ("-D__CUDA_ARCH_FEAT_SM90_ALL",)


def build_host_library(
    cache_dir: Path, sources: Sequence[Path] | None = None, options: Sequence[str] = ()
) -> Path:
    """Compile ``sources`` (default: all of ``csrc/cuda``) for the CPU, once per content.

    Returns:
        The shared library in ``cache_dir``. ``torch.ops.load_library`` registers its operators in
        the namespace ``t2t_cuda`` for CPU tensors.

    Raises:
        RuntimeError: the compiler refused a source; the message is the compiler's.
    """
    if sources is None:
        sources = sorted(CUDA_SOURCES.glob("*.cu"))
    folders = {source.parent for source in sources} | {SIMT, SIMT / "include"}
    digest = hashlib.sha256(repr((COMPILER, options, LINKER, torch.__version__)).encode())
    for path in sorted(path for folder in folders for path in folder.glob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    library = cache_dir / f"{sources[0].stem}-{digest.hexdigest()[:16]}.so"
    # Of several processes that need it at the same time, one compiles.
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _build(library, sources, options)
    return library


def _build(library: Path, sources: Sequence[Path], options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        units = [
            (source, Path(folder) / f"{source.stem}.o") for source in (*sources, SIMT / "simt.cpp")
        ]
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            command = (*options, "-x", "c++", "-c")
            list(compilers.map(lambda unit: _run(*command, unit[0], "-o", unit[1]), units))
        unfinished = Path(folder) / "library.so"
        _run(*(object for _, object in units), *LINKER, "-o", unfinished)
        unfinished.replace(library)  # only when it is complete


def _run(*arguments: str | Path) -> None:
    command = [*COMPILER, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
