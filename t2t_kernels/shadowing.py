"""A checkout without kernels that hides an installed package with kernels."""

import importlib.metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).resolve().parent


def why_shadowed() -> str | None:
    """A one-line message if this package has no compiled kernels and an installed t2tvit elsewhere on
    ``sys.path`` has them; otherwise None."""
    if _is_built(HERE):
        return None
    for distribution in importlib.metadata.distributions(name="t2tvit"):
        installed = Path(str(distribution.locate_file("t2t_kernels"))).resolve()
        if installed != HERE and _is_built(installed):
            return (
                f"{HERE} has no compiled kernels and hides the installed package in {installed}; "
                "run from another folder, or build the kernels here with `pip install --editable .`"
            )
    return None


def _is_built(package: Path) -> bool:
    return any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
