"""The environment that a run records: versions, source commit, device."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from t2tvit.version import __version__

SOURCE = Path(__file__).resolve().parents[1]  # of the package
PACKAGES = ("torch", "timm", "torchvision", "numpy", "triton")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages it depends on."""
    found = {"python": platform.python_version(), "t2tvit": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the package's source, with "-dirty" if files differ; None outside git."""
    git = ("git", "-C", str(SOURCE))
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    try:
        # A package that is installed inside another checkout has no commit of its own.
        subprocess.run((*git, "ls-files", "--error-unmatch", "__init__.py"), **options)
        describe = (*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        return subprocess.run(describe, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_device(device: torch.device) -> str:
    """A readable description of a device: the GPU's name, or the CPU and its threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
