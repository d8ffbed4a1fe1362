"""Checks the results of rows; rows with wrong results are not timed."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from bench.kernel_rows import DTYPES, Row
from bench.rivals import RIVALS
from bench.workloads import gradients, workload

SEED = 0
# Allowed error of our kernels: a multiple of plain PyTorch's error, plus roundings in case that is 0.
ALLOWED, ROUNDINGS = 2, 4
# Rivals may have a larger error, so that rounding alone excludes none.
RIVALS_ALLOWED = 20


class ParityError(AssertionError):
    """The results of a row differ from its reference."""


def check(row: Row, found: list[Tensor]) -> None:
    """Raise a ParityError if a row's :func:`results` are worse than twice plain PyTorch's.

    The error is the Euclidean norm of the difference of a whole tensor from float64. Non-finite values
    are wrong. A rival may have ten times the error.
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
                f"{row.name}: {what} has an error of {error:.1e}, expected at most {allowed:.1e}; not timed"
            )


@functools.lru_cache(maxsize=1)
def expected(row: Row) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the reference in the row's dtype and in float64, shared by all backends."""
    return results(row), results(row, exact=True)


def results(row: Row, exact: bool = False) -> list[Tensor]:
    """The result and, except for forward passes, the gradients for a fixed random weighting."""
    ready = workload(row, exact, SEED)
    y = ready.forward()
    # A captured graph reuses the memory of its results.
    found = [y.detach().clone()]
    if row.direction != "forward":
        torch.manual_seed(1)
        grad = torch.randn(y.shape, device=y.device).to(DTYPES[row.dtype]).to(y.dtype)
        found += [gradient.clone() for gradient in gradients(ready, y, grad)]
    return found
