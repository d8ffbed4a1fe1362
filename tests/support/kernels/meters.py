"""Measures launches and allocations of an operation."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode


class Work(TorchDispatchMode):
    """A context that records launched kernels and operators, and allocated memory."""

    ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
    VIEW = (
        "view",
        "detach",
        "expand",
        "alias",
        "t",
        "transpose",
        "_unsafe_view",
        "as_strided",
        "slice",
    )
    VIEW += ("split", "split_with_sizes", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.allocated, self.launched, self.in_kernel = [], [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        operator = function.name().split("::")[1].split(".")[0]
        # The interpreter copies its arguments; that is no work of ours.
        if not self.in_kernel:
            if operator in self.ALLOCATE:
                self.allocated.append(result)
            elif operator not in self.VIEW:
                self.launched.append(operator)
        return result

    def counting(self, run):
        def counted(kernel, *args, **kwargs):
            self.launched.append(kernel.fn.__name__)
            self.in_kernel = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self.in_kernel = False

        return counted


@contextlib.contextmanager
def work() -> Iterator[Work]:
    """The launches (including Triton's) and allocations of a block."""
    from triton.runtime import interpreter, jit

    inside = Work()
    with contextlib.ExitStack() as stack:
        for runner in (interpreter.InterpretedFunction, jit.JITFunction):
            stack.enter_context(mock.patch.object(runner, "run", inside.counting(runner.run)))
        stack.enter_context(inside)
        yield inside
