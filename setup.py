"""Builds ``t2t_kernels._C`` (C++, always) and ``t2t_kernels/_cuda.so`` (if nvcc is found).

Environment:
    T2T_WITH_CUDA         0 omits the CUDA library, 1 fails if it cannot be built; by default it is
                          omitted if it cannot be built.
    TORCH_CUDA_ARCH_LIST  architectures in torch's format; by default those of the visible GPUs, or all.
    MAX_JOBS              parallel compilers; by default as many as cores and memory allow.
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
# ninja may be installed only next to this Python, and torch looks for it in PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# LibTorch's stable ABI of 2.11: the build works with every later torch.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
ALL_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
GIB_PER_CXX_JOB, GIB_PER_NVCC_JOB = 2, 4


def why_no_cuda() -> str | None:
    """The reason why the CUDA library cannot be built here; None if it can."""
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
            f"nvcc is from CUDA {release[1]}.{release[2]} but torch was built with CUDA "
            f"{torch.version.cuda}; their major versions must agree"
        )
    return None


def nvcc_says(*options: str) -> str:
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    done = subprocess.run([nvcc, *options], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def cuda_library_dirs() -> list[str]:
    """The library folders of the toolkit; nvcc may be a link or script in another place."""
    top = Path(re.search(r"TOP=(\S+)", nvcc_says("--dryrun", "-x", "cu", os.devnull))[1])
    folders = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    return [str(folder.resolve()) for folder in folders if folder.is_dir()]


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
    """TORCH_CUDA_ARCH_LIST: the user's value, the visible GPUs, or all that nvcc supports."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked:
        names = asked.replace(";", " ").split()
        wrong = [name for name in names if not re.fullmatch(r"\d+\.\d+a?(\+PTX)?", name)]
        if wrong:
            sys.exit(
                f"t2tvit: TORCH_CUDA_ARCH_LIST: got {wrong[0]!r}, expected versions such as "
                "8.0;9.0a+PTX"
            )
        return ";".join(names)
    known = set(re.findall(r"compute_(\d+a?)", nvcc_says("--list-gpu-arch")))
    if torch.cuda.is_available():
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(devices)]
        # Instructions that only Hopper has need the suffix.
        wanted = ["9.0a" if name == "9.0" else name for name in wanted]
    else:
        wanted = list(ALL_ARCHITECTURES)
    # Older nvcc do not list 90a, but accept it if they know 90.
    chosen = [name for name in wanted if name.replace(".", "").rstrip("a") in known]
    if not chosen:
        sys.exit(
            f"t2tvit: nvcc knows none of the architectures {', '.join(wanted)}. Set "
            "TORCH_CUDA_ARCH_LIST, or T2T_WITH_CUDA=0 to build without CUDA kernels."
        )
    return ";".join(chosen) + "+PTX"


def parallel_jobs(gib_per_job: int) -> int:
    """The number of parallel compilers for the available cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container, if there is one
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return max(1, min(cores or 1, int(memory / 2**30 // gib_per_job)))


def cxx_compiler() -> str:
    """The first line of the C++ compiler's version; ends the build if there is no compiler."""
    command = (os.environ.get("CXX") or "c++").split()
    if shutil.which(command[0]) is None:
        sys.exit(f"t2tvit: no C++ compiler: {command[0]!r} was not found. Install g++ or set CXX.")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or command)[0].replace('"', "")


class BuildExtension(cpp_extension.BuildExtension):
    def get_ext_filename(self, name: str) -> str:
        # Not a Python module, but a library for torch.ops.load_library.
        if name.endswith("_cuda"):
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extensions(self) -> None:
        self.left_out: list[Extension] = []
        try:
            super().build_extensions()
        except Exception as error:
            hint = ""
            if any(extension.name.endswith("_cuda") for extension in self.extensions):
                hint = " T2T_WITH_CUDA=0 builds without the CUDA kernels."
            sys.exit(
                f"t2tvit: the kernels did not compile; see the first error above.{hint}\n{error}"
            )
        self.extensions = [e for e in self.extensions if e not in self.left_out]

    def build_extension(self, extension: Extension) -> None:
        """Build a library. A failure of the CUDA library is only an error if it was requested."""
        try:
            super().build_extension(extension)
        except Exception as error:
            if not extension.name.endswith("_cuda") or os.environ.get("T2T_WITH_CUDA") == "1":
                raise
            print(
                "t2tvit: building without the CUDA kernels: nvcc failed; see the first error above. "
                f"T2T_WITH_CUDA=1 makes this an error.\n{error}",
                file=sys.stderr,
            )
            self.left_out.append(extension)
            # Remove the library of an earlier build, and the architectures that `_C` reports.
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
            for other in self.extensions:
                other.define_macros = [
                    (name, '""' if name == "T2T_CUDA_ARCHITECTURES" else value)
                    for name, value in other.define_macros
                ]


def extensions() -> list[Extension]:
    with_cuda = wants_cuda()
    architectures = cuda_architectures() if with_cuda else ""
    jobs = parallel_jobs(GIB_PER_NVCC_JOB if with_cuda else GIB_PER_CXX_JOB)
    os.environ.setdefault("MAX_JOBS", str(jobs))

    cpu = cpp_extension.CppExtension(
        "t2t_kernels._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("cpu/*.cpp"))
        + ["csrc/bindings.cpp"],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=[
            ("T2T_COMPILER", f'"{cxx_compiler()}"'),
            ("T2T_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++20",
            "-fvisibility=hidden",
            "-Wall",
            *STABLE_ABI,
        ],
    )
    if not with_cuda:
        return [cpu]
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    cuda = Extension(
        "t2t_kernels._cuda",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("cuda/*.cu")),
        include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths(device_type="cuda")],
        library_dirs=[*cpp_extension.library_paths(device_type="cuda"), *cuda_library_dirs()],
        # The CUDA runtime is linked statically, so the library loads with a torch for another CUDA release.
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
    # The CUDA library first: whether it was built is part of the build information in `_C`.
    return [cuda, cpu]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
