"""The torch.library side of an operation: one schema, one fake, one gradient, a namespace per backend.

``torch.ops.t2t_cpu.soft_split``, ``torch.ops.t2t_triton.soft_split`` and
``torch.ops.t2t_cuda.soft_split`` have the same contract; the namespace names the backend in graphs
and profiler traces. Implementations register themselves: C++ from ``csrc/``, Triton from Python.
"""

import functools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACES = {"cpu": "t2t_cpu", "triton": "t2t_triton", "cuda": "t2t_cuda"}


def declare(
    name: str,
    schema: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Declare an operation in every backend's namespace.

    Args:
        name: the operation's name, as in ``torch.ops.t2t_cpu.<name>``.
        schema: arguments and results in torch.library's notation.
        fake: shapes, dtypes and strides of the results, for tracing.
        setup_context: what is kept for the backward, as in ``torch.library.register_autograd``.
        backward: ``backward(ops, ctx, *grads)``; ``ops`` is the namespace of the backend that ran
            the forward, so that its gradient is served by the same one.
        flops: operations of the matrix products, for ``torch.utils.flop_counter``; called like the
            operation, with shapes for tensors. What a kernel computes twice counts once.
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
        if flops is not None:
            register_flop_formula(getattr(getattr(torch.ops, namespace), name))(_counted(flops))


def _counted(flops: Callable[..., int]) -> Callable[..., int]:
    """``flops`` as the counter calls it, with the shapes of the results too."""

    def formula(*arguments, out_shape=None, **_) -> int:
        return flops(*arguments)

    return formula


def operators(backend: str):
    """The namespace of ``torch.ops`` that holds a compiled backend's operators."""
    return getattr(torch.ops, NAMESPACES[backend])


def no_second_derivative(ops, ctx, *grads):
    """The ``backward`` of a gradient that has none of its own."""
    raise NotImplementedError(
        'the fused kernels have no second derivative; use backend="reference" (for a model '
        'fused_kernels="reference")'
    )
