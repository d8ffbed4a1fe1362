"""The contract of the Performer T2T layer: schemas, fakes and gradients.

Besides the inputs, the backward needs the maximum, normaliser and sums of ``performer_attention`` per
image and feature, but nothing per token. Dropout masks are recomputed from the seed.
"""

from typing import Any, get_type_hints

import torch
from torch import Tensor

from t2t_kernels import flops
from t2t_kernels.arguments import output_size, split_of
from t2t_kernels.backends import HALF_DTYPES, Kernel, Operation, register
from t2t_kernels.library import declare, named_tuple, no_second_derivative
from t2t_kernels.performer_layer.params import PerformerLayerParams
from t2t_kernels.soft_split_linear.ops import like_map, why_not_a_grid, why_not_projected

_TENSORS: list[tuple[str, Any]] = [
    ("x", Tensor),
    *get_type_hints(PerformerLayerParams).items(),
    ("seed", Tensor | None),
]
_SAVED: list[tuple[str, Any]] = [("maximum", Tensor), ("normalizer", Tensor), ("sums", Tensor)]
_NUMBERS: list[tuple[str, Any]] = [
    ("kernel_size", int),
    ("stride", int),
    ("padding", int),
    ("eps", float),
    ("dropout_p", float),
]
Arguments = named_tuple("Arguments", _TENSORS + _NUMBERS)
BackwardArguments = named_tuple(
    "BackwardArguments",
    [("grad", Tensor), *_TENSORS, *_SAVED, *_NUMBERS, ("need_x", bool)],
)
# The parameters with a gradient; w is a constant.
_TRAINED = tuple(name for name in PerformerLayerParams._fields if name != "w")


def _fake(call: Any) -> tuple[Tensor, ...]:
    x, (features, embed) = call.x, call.w.shape
    h, w = output_size(x.shape[2], x.shape[3], *split_of(call))
    return (
        x.new_empty((x.shape[0], h * w, embed)),
        x.new_empty((x.shape[0], features), dtype=torch.float32),
        x.new_empty((x.shape[0], features), dtype=torch.float32),
        x.new_empty((x.shape[0], features, embed), dtype=torch.float32),
    )


def _backward_fake(call: Any) -> tuple[Tensor, ...]:
    trained = (getattr(call, name) for name in _TRAINED)
    return (
        like_map(call.x) if call.need_x else call.x.new_empty(0),
        *(parameter.new_empty(parameter.shape) for parameter in trained),
    )


def _setup_context(ctx, call: Any, output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.numbers = call[len(_TENSORS) :]
    ctx.save_for_backward(*call[: len(_TENSORS)], *saved)
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad: Tensor | None, *_) -> dict[str, Tensor]:
    if grad is None:
        return {}
    need_x = ctx.needs_input_grad[0]
    grad_x, *grads = ops.performer_layer_backward(grad, *ctx.saved_tensors, *ctx.numbers, need_x)
    return ({"x": grad_x} if need_x else {}) | dict(zip(_TRAINED, grads, strict=True))


def _flops(call: Any) -> int:
    split, (features, embed) = split_of(call), call.w
    v = flops.token_shape(call.x, embed, split)
    return (
        flops.soft_split_linear(call.x, call.kqv_weight, split)
        + flops.performer_attention(v, features)
        + flops.layer_tail(v, call.mlp_0_weight[0])
    )


def _backward_flops(call: Any) -> int:
    split, (features, embed) = split_of(call), call.w
    v = flops.token_shape(call.x, embed, split)
    return (
        flops.soft_split_linear_backward(call.x, call.kqv_weight, split, call.need_x)
        + flops.performer_attention_backward(v, features)
        + 2 * flops.layer_tail(v, call.mlp_0_weight[0])
    )


PERFORMER_LAYER = register(
    Operation(
        "performer_layer",
        kernels={
            "cpu": Kernel(),
            "triton": Kernel(sizes=dict.fromkeys("EmM", range(129)), why_not_map=why_not_a_grid),
            "cuda": Kernel(
                HALF_DTYPES,
                {"E": range(64, 65), "m": range(32, 33), "M": range(64, 65)},
                why_not_projected,
            ),
        },
        parts=("soft_split_linear", "performer_attention"),
        cuda_first=HALF_DTYPES,
    )
)

declare(
    "performer_layer",
    Arguments,
    "(Tensor y, Tensor maximum, Tensor normalizer, Tensor sums)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
declare(
    "performer_layer_backward",
    BackwardArguments,
    f"(Tensor, {', '.join(['Tensor'] * len(_TRAINED))})",
    fake=_backward_fake,
    backward=no_second_derivative,
    flops=_backward_flops,
)
