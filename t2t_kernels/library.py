"""Registers operations with torch.library: one schema, fake and gradient, and a namespace per backend.

``torch.ops.t2t_cpu.soft_split``, ``torch.ops.t2t_triton.soft_split`` and
``torch.ops.t2t_cuda.soft_split`` have the same contract; the namespace shows the backend in graphs
and profiler traces. Implementations register themselves when their backend is loaded: C++ from
``csrc/``, Triton from Python.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from t2t_kernels import flops as flop_counts
from t2t_kernels.backends import BACKENDS, why_unavailable
from t2t_kernels.errors import BackendUnavailable

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    torch.SymInt: "SymInt",
    int: "int",
    float: "float",
    bool: "bool",
}


def named_tuple(name: str, fields: list[tuple[str, Any]]) -> Any:
    """A NamedTuple with computed fields, which type checkers cannot follow."""
    create: Any = NamedTuple
    return create(name, fields)


def declare(
    name: str,
    arguments: type[NamedTuple],
    results: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable,
    flops: Callable[..., int] | None = None,
) -> None:
    """Declare an operation in every backend's namespace.

    Args:
        name: The operation's name, as in ``torch.ops.t2t_cpu.<name>``.
        arguments: A NamedTuple with the names and types of the operator's arguments. The functions
            below get an instance, ``call``.
        results: The results in torch.library's notation.
        fake: ``fake(call)``: shapes, dtypes and strides of the results, for tracing.
        setup_context, backward: As in :func:`register_gradient`.
        flops: ``flops(call)``, with shapes for tensors: the operations of matrix products, for
            ``torch.utils.flop_counter``. Recomputation is not counted.
    """
    hints = get_type_hints(arguments).items()
    schema = ", ".join(f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in hints)

    def fake_of(*values, **named):
        return fake(arguments(*values, **named))

    for backend in BACKENDS.values():
        if backend.namespace is None:
            continue
        qualified = f"{backend.namespace}::{name}"
        torch.library.define(qualified, f"({schema}) -> {results}")
        torch.library.register_fake(qualified, fake_of)
        torch.library.impl(qualified, "default")(_load_and_call(backend.name, qualified))
        register_gradient(backend.namespace, name, arguments, backward, setup_context)
        if flops is not None:
            flop_counts.register(_operator(qualified), _of_arguments(flops, arguments))


def _of_arguments(flops: Callable[..., int], arguments: type[NamedTuple]) -> Callable[..., int]:
    """The formula ``flops(call)`` as a function of the operator's arguments."""

    def formula(*values, out_shape=None, **named) -> int:
        return flops(arguments(*values, **named))

    return formula


def register_gradient(
    namespace: str,
    name: str,
    arguments: type[NamedTuple],
    backward: Callable,
    setup_context: Callable | None = None,
) -> None:
    """Give the operator ``name`` of ``namespace`` a gradient.

    Args:
        backward: ``backward(ops, ctx, *grads)``, which returns gradients by argument name; missing
            arguments have none. ``ops`` is the namespace of the backend of the forward, so that the
            same backend computes the gradient.
        setup_context: ``setup_context(ctx, call, output)``, which saves tensors for the backward.
    """

    def named_setup_context(ctx, inputs, output) -> None:
        if setup_context is not None:
            setup_context(ctx, arguments(*inputs), output)

    def positional_backward(ctx, *grads):
        found = backward(getattr(torch.ops, namespace), ctx, *grads)
        return tuple(found.get(field) for field in arguments._fields)

    torch.library.register_autograd(
        f"{namespace}::{name}", positional_backward, setup_context=named_setup_context
    )


def _load_and_call(backend: str, qualified: str) -> Callable:
    """A kernel that loads the backend at the first call, for instance in an exported program."""

    def kernel(*arguments):
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        reason = why_unavailable(backend, device)
        if reason is None and not _has_kernel(qualified, device.type.upper()):
            reason = "its build has no such operator; build it again with `pip install .`"
        if reason is not None:
            raise BackendUnavailable(f"cannot run {qualified} on the {backend} backend: {reason}")
        # The operator is registered now.
        return _operator(qualified)(*arguments)

    return kernel


def _operator(qualified: str):
    namespace, name = qualified.split("::")
    return getattr(getattr(torch.ops, namespace), name)


def operators(backend: str):
    """The namespace of ``torch.ops`` with a compiled backend's operators."""
    namespace = BACKENDS[backend].namespace
    assert namespace is not None, f"{backend} has no operators"
    return getattr(torch.ops, namespace)


def no_second_derivative(ops, ctx, *grads):
    """The ``backward`` of a gradient without a derivative."""
    raise NotImplementedError(
        'the fused kernels have no second derivative; use backend="reference" (for a model '
        'fused_kernels="reference")'
    )
