"""A checkout without kernels warns if it hides an installed package with kernels."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from t2t_kernels import shadowing


@pytest.fixture
def clone(tmp_path):
    """Runs Python in a checkout without kernels, with an installed package that has kernels."""
    root = Path(__file__).parents[1]
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "results")
    for package in ("t2t_kernels", "t2tvit", "bench"):
        shutil.copytree(root / package, tmp_path / "clone" / package, ignore=ignore)
    shutil.copy(root / "pyproject.toml", tmp_path / "clone")
    installed = tmp_path / "site" / "t2t_kernels"
    installed.mkdir(parents=True)
    metadata = tmp_path / "site" / "t2tvit-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: t2tvit\nVersion: 0.1.0\n")

    (installed / f"_C{EXTENSION_SUFFIXES[0]}").touch()

    def run(*words):
        # -S: an editable install adds an import hook that finds its own kernels.
        paths = [tmp_path / "clone", tmp_path / "site", sysconfig.get_path("purelib")]
        return subprocess.run(
            [sys.executable, "-S", *words],
            cwd=tmp_path / "clone",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        )

    return run


REMEDY = "run from another folder, or build the kernels here with `pip install --editable .`"


@pytest.mark.parametrize("words", ["-m t2tvit models t2t_vit_7", "-c 'import t2t_kernels'"])
def test_a_checkout_that_hides_installed_kernels_warns(clone, words):
    done = clone(*shlex.split(words))
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if REMEDY in line)
    assert "hides the installed package in" in line and "site" in line


def test_info_and_bench_name_the_hidden_kernels(clone):
    done = clone("-m", "t2t_kernels.info")
    assert re.search(f"^  cpu +not available: .*{re.escape(REMEDY)}$", done.stdout, re.MULTILINE)
    done = clone("-m", "pytest", "bench/", "--benchmark-disable", "-q")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert any(line.startswith("ERROR:") and REMEDY in line for line in done.stderr.splitlines())


def test_a_checkout_hides_nothing_without_installed_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(shadowing, "HERE", tmp_path / "t2t_kernels")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert shadowing.why_shadowed() is None
