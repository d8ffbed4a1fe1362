"""``python -m t2t_kernels.info``: versions, devices and available backends."""

import importlib.metadata
import os
import platform
import sys

import torch

from t2t_kernels.backends import (
    BACKENDS,
    OPERATIONS,
    explain,
    preference,
    why_not_here,
    why_unavailable,
)

# The order of backends on CUDA differs between float32 and half types.
CUDA_DTYPES = (torch.float32, torch.bfloat16)


def report() -> str:
    """The information that a bug report needs, as text."""
    lines = ["versions"]
    for package in ("t2tvit", "torch", "triton", "numpy"):
        lines.append(f"  {package:<10}{_version(package)}")
    lines.append(f"  {'python':<10}{platform.python_version()} on {platform.platform()}")

    lines.append("build")
    if why_unavailable("cpu") is None:
        for key, value in importlib.import_module("t2t_kernels._C").build_info().items():
            lines.append(f"  {key.replace('_', ' '):<20}{value or 'none'}")
    else:
        lines.append(f"  {why_unavailable('cpu')}")

    lines.append("devices")
    devices = [torch.device("cpu")]
    isa = "none"
    if why_unavailable("cpu") is None:
        isa = importlib.import_module("t2t_kernels._C").cpu_isa()
    lines.append(
        f"  cpu       {platform.machine()}, {torch.get_num_threads()} threads, kernels for {isa}"
    )
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"  cuda:{index}    {properties.name}, compute capability {properties.major}."
            f"{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )

    lines.append("backends")
    for backend in BACKENDS:
        reason = why_not_here(backend)
        lines.append(f"  {backend:<11}{f'not available: {reason}' if reason else 'available'}")

    if os.environ.get("T2T_BACKEND"):
        lines.append(f"T2T_BACKEND={os.environ['T2T_BACKEND']} is set in the environment")
    lines.append("operations and their default backends")
    for device in devices[:2]:
        for dtype in CUDA_DTYPES if device.type == "cuda" else (torch.float32,):
            for choice in explain(device, dtype=dtype):
                served = choice.backend or "cannot run"
                lines.append(
                    f"  {device.type:<6}{_name(dtype):<10}{choice.operation:<22}{served:<11}"
                    f"{choice.reason}"
                )

    lines.append("order of backends on CUDA")
    for operation in OPERATIONS.values():
        for dtype in CUDA_DTYPES:
            order, evidence = preference(operation, "cuda", dtype)
            lines.append(f"  {operation.name:<22}{_name(dtype):<10}{', '.join(order)}: {evidence}")
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    try:
        print(report())
    except (ValueError, RuntimeError) as error:
        print(f"t2t_kernels: {error}", file=sys.stderr)
        sys.exit(2)
