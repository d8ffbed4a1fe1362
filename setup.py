"""Builds ``t2t_kernels._C`` (C++, everywhere) and ``t2t_kernels/_cuda.so`` (where nvcc is found).

Environment:
    T2T_WITH_CUDA         0 leaves the CUDA library out, 1 fails where it cannot be built.
    TORCH_CUDA_ARCH_LIST  architectures, as torch reads it; else those of the visible GPUs; else all.
    MAX_JOBS              compilers at a time; else as many as cores and memory allow.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"t2tvit: {error.name} is missing from the build environment. Run `pip install .` with build "
        "isolation, or install torch, pybind11, ninja, packaging and setuptools first."
    )

ROOT = Path(__file__).parent
# LibTorch's stable ABI as of 2.11: what is built here loads under every later torch.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
ALL_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
GIB_PER_CXX_JOB, GIB_PER_NVCC_JOB = 2, 4


def why_no_cuda() -> str | None:
    """The reason why the CUDA library cannot be built here; None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} of the build environment is a CPU build"
    if cpp_extension.CUDA_HOME is None:
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{nvcc} does not exist; set CUDA_HOME to a CUDA toolkit"
    release = re.search(r"release (\d+)\.(\d+)", nvcc_says("--version"))
    if release and release[1] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {release[1]}.{release[2]} but torch was built with CUDA "
            f"{torch.version.cuda}; their major versions must agree"
        )
    return None


def nvcc_says(option: str) -> str:
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    return subprocess.run([nvcc, option], check=True, capture_output=True, text=True).stdout


def wants_cuda() -> bool:
    choice = os.environ.get("T2T_WITH_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"t2tvit: T2T_WITH_CUDA={choice!r}, expected 0 or 1")
    if choice == "0":
        return False
    reason = why_no_cuda()
    if reason and choice == "1":
        sys.exit(
            f"t2tvit: cannot build the CUDA kernels: {reason}. T2T_WITH_CUDA=0 builds without them."
        )
    if reason:
        print(f"t2tvit: building without the CUDA kernels: {reason}.", file=sys.stderr)
    return reason is None


def cuda_architectures() -> str:
    """As TORCH_CUDA_ARCH_LIST: the user's, else the visible GPUs', else all that nvcc knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    known = set(re.findall(r"compute_(\d+a?)", nvcc_says("--list-gpu-arch")))
    if torch.cuda.is_available():
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(devices)]
        # Hopper's own instructions need its suffix.
        wanted = ["9.0a" if name == "9.0" else name for name in wanted]
    else:
        wanted = list(ALL_ARCHITECTURES)
    # nvcc lists 90a only from some versions on, but takes it wherever it knows 90.
    chosen = [name for name in wanted if name.replace(".", "").rstrip("a") in known]
    if not chosen:
        sys.exit(
            f"t2tvit: nvcc knows none of the architectures {', '.join(wanted)}. Set "
            "TORCH_CUDA_ARCH_LIST, or T2T_WITH_CUDA=0 to build without CUDA kernels."
        )
    return ";".join(chosen) + "+PTX"


def parallel_jobs(gib_per_job: int) -> int:
    """Compilers at a time that neither starve the cores nor exhaust the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(cores or 1, int(gib // gib_per_job)))


class BuildExtension(cpp_extension.BuildExtension):
    def get_ext_filename(self, name: str) -> str:
        # Not a Python module, but a library for torch.ops.load_library.
        if name.endswith("_cuda"):
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            sys.exit(f"t2tvit: no C++ compiler: {compiler!r} was not found. Install g++ or set CXX.")
        try:
            super().build_extensions()
        except Exception as error:
            hint = ""
            if any(extension.name.endswith("_cuda") for extension in self.extensions):
                hint = " T2T_WITH_CUDA=0 builds without the CUDA kernels."
            sys.exit(f"t2tvit: the kernels did not compile: {error}\nt2tvit: see the first error above.{hint}")


def extensions() -> list[Extension]:
    with_cuda = wants_cuda()
    architectures = cuda_architectures() if with_cuda else ""
    jobs = parallel_jobs(GIB_PER_NVCC_JOB if with_cuda else GIB_PER_CXX_JOB)
    os.environ.setdefault("MAX_JOBS", str(jobs))

    compiler = os.environ.get("CXX", "c++")
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
    described = version.stdout.splitlines()[0] if version.stdout else compiler
    described = described.replace('"', "")
    cpu = cpp_extension.CppExtension(
        "t2t_kernels._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("cpu/*.cpp"))
        + ["csrc/bindings.cpp"],
        include_dirs=[str(ROOT / "csrc" / "cpu"), pybind11.get_include()],
        define_macros=[
            ("T2T_COMPILER", f'"{described}"'),
            ("T2T_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ],
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", *STABLE_ABI],
    )
    if not with_cuda:
        return [cpu]
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    cuda = Extension(
        "t2t_kernels._cuda",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("cuda/*.cu")),
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths(device_type="cuda")],
        library_dirs=cpp_extension.library_paths(device_type="cuda"),
        # The runtime is linked in: the library then loads under a torch of another CUDA release.
        libraries=["cudart_static", "rt", "dl", "pthread", "torch", "torch_cpu", "c10"],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", *STABLE_ABI],
            "nvcc": [
                "-O3",
                "-std=c++20",
                "-DUSE_CUDA",
                "-lineinfo",
                "-Xptxas",
                "--warn-on-spills",
                *STABLE_ABI,
            ],
        },
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda"],
        language="c++",
    )
    return [cpu, cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
