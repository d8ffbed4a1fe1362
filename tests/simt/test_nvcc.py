"""Checks of nvcc's output, which running on the CPU cannot show."""

import ast
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cuda import occupancy, sass
from tests.support.cuda.build import CUDA_SOURCES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup.py"


@pytest.fixture(scope="module")
def compiled(host_cache):
    """Compiled for every architecture with warnings and register spills as errors."""
    if not occupancy.NVCC:
        pytest.skip("nvcc was not found")
    return occupancy.compile_all(host_cache)


@pytest.fixture(scope="module")
def kernels(compiled):
    """The PTX of every kernel by name, for Hopper."""
    text = "".join(
        path.read_text() for folder in compiled.values() for path in folder.glob("*compute_90a.ptx")
    )
    return dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.visible|\.weak|\.entry|\Z)", text, re.DOTALL))


@pytest.mark.parametrize(
    ("kernel", "accesses"),
    [
        ("12split_kernelI", ["ld.global", "st.shared", "ld.shared", "st.global"]),
        ("gather_kernelI.*Lb1E", ["ld.global", "st.shared", "st.global"]),
        ("gather_kernelI.*Lb0E", ["st.global"]),
        ("project_rows_kernelI", ["ld.global", "st.global"]),
        ("project_taps_kernelI.*Lb1E", ["ld.global", "st.global"]),
        ("weight_gradient_kernelI.*Li0ELb1E", ["ld.global", "st.shared"]),
        ("map_gradient_kernelI", ["ld.global", "st.global"]),
        (r"\d\dkeys_kernelI", ["ld.global", "ld.shared", "st.shared"]),
        (r"\d\dqueries_kernelI", ["ld.global", "st.global"]),
        (r"\d\dqueries_backward_kernelI", ["ld.global", "st.shared", "st.global"]),
        (r"\d\dkeys_backward_kernelI", ["ld.global", "st.global"]),
        (r"(\d\dattend|(tail|layer)_backward)_kernelI", ["ld.global", "ld.shared", "st.global"]),
        (r"(softmax_\w*|layer_attend_)kernelI", ["ld.shared", "st.global"]),
    ],
    ids=[
        "split",
        "gather-staged",
        "gather-in-place",
        "project-rows",
        "project-taps",
        "weight-gradient-of-taps",
        "map-gradient",
        "performer-keys",
        "performer-queries",
        "performer-queries-backward",
        "performer-keys-backward",
        "tails",
        "softmax",
    ],
)
def test_moves_16_bytes_at_a_time(kernels, kernel, accesses):
    """nvcc silently uses narrow accesses if it cannot see that they are aligned."""
    chosen = {name: ptx for name, ptx in kernels.items() if re.search(kernel, name)}
    assert chosen, f"no kernel {kernel} among {list(kernels)}"
    for name, ptx in chosen.items():
        for access in accesses:
            wide = rf"{access}(\.wb|\.ca)?\.v4\.[ufb]32"
            assert re.search(wide, ptx), f"{name} has no {access} of 16 bytes"


def cuobjdump():
    """The tool of the CUDA toolkit, or of Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


# Kernels that use the matrix unit, with and without asynchronous copies.
COPYING = [
    "layer_attend",
    "softmax",
    "softmax_queries_backward",
    "softmax_keys_backward",
    "project_rows",
    "project_taps",
    "weight_gradient",
    "map_gradient",
    "keys",
]
LOADING = [
    "attend",
    "queries",
    "keys_backward",
    "queries_backward",
    "layer_backward",
    "transformer_tail_backward",
]
MATRIX = [*COPYING, *LOADING]
# Kernels with warpgroup products on Hopper.
WARPGROUP = [
    "layer_attend",
    "softmax",
    "softmax_queries_backward",
    "softmax_keys_backward",
    "project_rows",
    "project_taps",
    "weight_gradient",
    "map_gradient",
    "attend",
    "queries",
    "keys_backward",
    "queries_backward",
    "layer_backward",
    "transformer_tail_backward",
]


@pytest.mark.parametrize("architecture", occupancy.ARCHITECTURES)
def test_machine_code(compiled, architecture):
    if cuobjdump() is None:
        pytest.skip("cuobjdump was not found")
    seen = set()
    for source, folder in compiled.items():
        command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", folder / "object.o"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in text.split("Function : ")[1:]:
            name, code = function.split("\n", 1)
            kernel = re.search(r"\d([a-z_]+)_kernelI", name)
            if kernel is None:
                continue
            if kernel[1] in MATRIX:
                assert re.search("HG?MMA", code), f"{name} of {source}"
                seen.add(kernel[1])
            else:
                assert "HMMA" not in code, f"{name} of {source}"
            by_warpgroup = architecture == "90a" and kernel[1] in WARPGROUP
            assert ("HGMMA" in code) == by_warpgroup, f"{name} of {source}"
            if by_warpgroup:
                assert sass.faults(code) == [], f"{name} of {source}"
            if kernel[1] in COPYING:
                assert "LDGSTS" in code, f"{name} of {source} copies nothing asynchronously"
    assert seen == set(MATRIX)


def test_shared_memory_is_aligned_for_the_swizzle(compiled):
    """wgmma permutes address bits, so its operands must begin at a multiple of 1024."""
    for folder in compiled.values():
        (ptx,) = folder.glob("*compute_90a.ptx")
        text = ptx.read_text()
        assert "wgmma" not in text or ".extern .shared .align 1024 .b8 dynamic_shared[]" in text


def test_static_shared_memory_is_within_the_launchers_limit(compiled):
    source = (CUDA_SOURCES / "launch.h").read_text()
    allowed = int(re.search(r"kMostStaticSharedBytes = (\d+)", source)[1])
    assert max(static for _, static in occupancy.resources(compiled).values()) <= allowed


def test_assembles_for_the_other_architectures_of_the_build(compiled, tmp_path):
    """Other architectures of setup.py, except later minor versions, which run the code of the first."""
    listed = re.search(r"^ALL_ARCHITECTURES = (\(.*\))", SETUP.read_text(), re.MULTILINE)[1]
    names = {version.replace(".", "") for version in ast.literal_eval(listed)}
    assert names > set(occupancy.ARCHITECTURES)
    majors = {re.match(r"\d+(?=\d)", name)[0] for name in occupancy.ARCHITECTURES}
    others = {name for name in names if re.match(r"\d+(?=\d)", name)[0] not in majors}
    for name in others:
        for folder in compiled.values():
            (ptx,) = folder.glob("*compute_80.ptx")
            command = [occupancy.NVCC, "-cubin", f"-arch=sm_{name}", "-Xptxas", "-O0", ptx]
            command += ["-o", tmp_path / "cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_table_is_what_the_compiler_reports(compiled, cuda_on_host, host_cache):
    """The table is in docs/gpu.md; ``python -m tests.support.cuda.occupancy`` prints it."""
    document = occupancy.DOCUMENT.read_text()
    version = re.search(r"nvcc (\d+\.\d+)", document)[1]
    if occupancy.release() != version:
        pytest.skip(f"the table is of nvcc {version}, this is {occupancy.release()}")
    assert occupancy.table(host_cache) in document, "run python -m tests.support.cuda.occupancy"
