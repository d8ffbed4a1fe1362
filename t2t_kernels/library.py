"""The torch.library side of an operation: one schema, one fake, one gradient, a namespace per backend.

``torch.ops.t2t_cpu.soft_split``, ``torch.ops.t2t_triton.soft_split`` and
``torch.ops.t2t_cuda.soft_split`` have the same contract; the namespace names the backend in graphs
and profiler traces. Implementations register themselves: C++ from ``csrc/``, Triton from Python.
"""

import functools
from collections.abc import Callable

import torch

NAMESPACES = {"cpu": "t2t_cpu", "triton": "t2t_triton", "cuda": "t2t_cuda"}


def declare(
    name: str,
    schema: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Declare an operation in every backend's namespace.

    Args:
        name: the operation's name, as in ``torch.ops.t2t_cpu.<name>``.
        schema: arguments and results in torch.library's notation.
        fake: shapes, dtypes and strides of the results, for tracing.
        setup_context: what is kept for the backward, as in ``torch.library.register_autograd``.
        backward: ``backward(ops, ctx, *grads)``; ``ops`` is the namespace of the backend that ran
            the forward, so that its gradient is served by the same one.
    """
    for namespace in NAMESPACES.values():
        qualified = f"{namespace}::{name}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            ops = getattr(torch.ops, namespace)
            torch.library.register_autograd(
                qualified, functools.partial(backward, ops), setup_context=setup_context
            )


def operators(backend: str):
    """The namespace of ``torch.ops`` that holds a compiled backend's operators."""
    return getattr(torch.ops, NAMESPACES[backend])


def no_second_derivative(ops, ctx, *grads):
    """The ``backward`` of a gradient that has none of its own."""
    raise NotImplementedError(
        'the fused kernels have no second derivative; backend="reference" has one'
    )
