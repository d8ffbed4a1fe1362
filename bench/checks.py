"""No time is taken of a wrong result."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from bench.kernel_rows import DTYPES, Row
from bench.rivals import RIVALS
from bench.workloads import gradients, workload

SEED = 0
# Of plain PyTorch's error, for our kernels; and roundings, for what it happens to get exactly.
ALLOWED, ROUNDINGS = 2, 4
# A rival is not to be ruled out for its roundings, only for computing something else.
RIVALS_ALLOWED = 20


class ParityError(AssertionError):
    """A row computes something else than its reference."""


def check(row: Row, found: list[Tensor]) -> None:
    """Raise a ParityError if a row's :func:`results` are worse than twice plain PyTorch's.

    The error is that of the whole tensor, against float64, in the Euclidean norm; what is not
    finite is wrong. A rival may err ten times as much.
    """
    if row.backend == "reference":
        return
    plain, exact = expected(replace(row, backend="reference"))
    assert_as_accurate(row, found, plain, exact)


def assert_as_accurate(row: Row, ours, plain, exact) -> None:
    times = RIVALS_ALLOWED if row.backend in RIVALS else ALLOWED
    rounding = ROUNDINGS * torch.finfo(DTYPES[row.dtype]).eps
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        error = (a.double() - c).norm()
        allowed = times * ((b.double() - c).norm() + rounding / ALLOWED * c.norm())
        if not error <= allowed:
            what = "result" if i == 0 else f"gradient {i - 1}"
            raise ParityError(
                f"{row.name}: {what} is off by {error:.1e}, allowed are {allowed:.1e}; not timed"
            )


@functools.lru_cache(maxsize=1)
def expected(row: Row) -> tuple[list[Tensor], list[Tensor]]:
    """Of the reference, in the row's dtype and in float64: shared by the row's backends."""
    return results(row), results(row, exact=True)


def results(row: Row, exact: bool = False) -> list[Tensor]:
    """The result and, unless it is a forward pass, the gradients of a fixed random weighting."""
    ready = workload(row, exact, SEED)
    y = ready.forward()
    # A captured graph reuses the memory of its results.
    found = [y.detach().clone()]
    if row.direction != "forward":
        torch.manual_seed(1)
        grad = torch.randn(y.shape, device=y.device).to(DTYPES[row.dtype]).to(y.dtype)
        found += [gradient.clone() for gradient in gradients(ready, y, grad)]
    return found
