"""setup.py keeps the CPU kernels if the CUDA library does not compile."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def command(monkeypatch):
    """setup.py's build_ext with both libraries; the compilers are replaced, and nvcc fails."""
    monkeypatch.setenv("T2T_WITH_CUDA", "0")  # while its extensions are listed
    captured = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: captured.update(arguments))
    runpy.run_path(str(SETUP))
    monkeypatch.delenv("T2T_WITH_CUDA")

    built = []

    def build(self, extension):
        if extension.name.endswith("_cuda"):
            raise RuntimeError("nvcc: exit status 2")
        built.append((extension.name, dict(extension.define_macros)))

    def build_all(self):
        for extension in self.extensions:
            self.build_extension(extension)

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extension", build)
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", build_all)
    result = captured["cmdclass"]["build_ext"](Distribution())
    macros = [("T2T_CUDA_ARCHITECTURES", '"8.0"'), ("T2T_COMPILER", '"c++"')]
    result.extensions = [
        Extension("another._cuda", []),
        Extension("t2t_kernels._C", [], define_macros=macros),
    ]
    result.built = built
    return result


def test_failed_cuda_build_is_left_out(command, capsys):
    command.build_extensions()
    assert [extension.name for extension in command.extensions] == ["t2t_kernels._C"]
    macros = {"T2T_CUDA_ARCHITECTURES": '""', "T2T_COMPILER": '"c++"'}
    assert command.built == [("t2t_kernels._C", macros)]
    assert "building without the CUDA kernels: nvcc failed" in capsys.readouterr().err


def test_failed_cuda_build_is_an_error_if_asked_for(command, monkeypatch):
    monkeypatch.setenv("T2T_WITH_CUDA", "1")
    with pytest.raises(SystemExit, match="did not compile.*T2T_WITH_CUDA=0"):
        command.build_extensions()


def test_linters_are_the_same_in_every_place():
    pinned = r"\b(ruff|clang-format)==([\d.]+)"
    extra, hooks = (
        dict(re.findall(pinned, (SETUP.parent / name).read_text()))
        for name in ("pyproject.toml", ".pre-commit-config.yaml")
    )
    assert extra == hooks and set(extra) == {"ruff", "clang-format"}


@pytest.mark.parametrize("package", ["t2tvit", "t2t_kernels"])
def test_type_information_is_installed(package):
    assert (SETUP.parent / package / "py.typed").exists()
    patterns = Distribution({"package_data": {}})
    patterns.parse_config_files([str(SETUP.parent / "pyproject.toml")])
    assert "py.typed" in patterns.package_data[package]
