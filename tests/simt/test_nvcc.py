"""What running on the CPU cannot show: that nvcc makes of the source what was meant."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests.simt.build import CUDA_SOURCES, TORCH

NVCC = shutil.which("nvcc") or cpp_extension.CUDA_HOME and Path(cpp_extension.CUDA_HOME, "bin/nvcc")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The PTX of every kernel by name, compiled with warnings and register spills as errors."""
    if not NVCC:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("nvcc")
    for source in CUDA_SOURCES.glob("*.cu"):
        command = [
            *(NVCC, "-c", source, "-O3", "-std=c++20", "-o", folder / "object.o"),
            *("-gencode", "arch=compute_90a,code=sm_90a", "--keep", "--keep-dir", folder),
            *("-Werror", "all-warnings", "-Xptxas", "--warn-on-spills", "-Xcompiler", "-Wall"),
            *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
            *("-isystem", TORCH / "include"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"nvcc {source.name}:\n{result.stderr}"
    text = "".join(path.read_text() for path in folder.glob("*.ptx"))
    return dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.visible|\.weak|\.entry|\Z)", text, re.DOTALL))


@pytest.mark.parametrize(
    ("kernel", "accesses"),
    [
        ("split_kernelI", ["ld.global", "st.shared", "ld.shared", "st.global"]),
        ("gather_kernelI.*Lb1E", ["ld.global", "st.shared", "st.global"]),
        ("gather_kernelI.*Lb0E", ["st.global"]),
    ],
    ids=["split", "gather-staged", "gather-in-place"],
)
def test_moves_16_bytes_at_a_time(kernels, kernel, accesses):
    """nvcc falls back to narrow accesses, silently, where it cannot see that they are aligned."""
    chosen = {name: ptx for name, ptx in kernels.items() if re.search(kernel, name)}
    assert chosen, f"no kernel {kernel} among {list(kernels)}"
    for name, ptx in chosen.items():
        for access in accesses:
            wide = rf"{access}(\.wb)?\.v4\.[ufb]32"
            assert re.search(wide, ptx), f"{name} has no {access} of 16 bytes"
