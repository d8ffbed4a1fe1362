"""Operations of matrix products, two per multiply-add, for ``torch.utils.flop_counter``.

Recomputation in the backward is not counted. Arguments are shapes, named as in the documentation of the
operations.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from typing import Any

from t2t_kernels.arguments import output_size

Shape = Sequence[int]

COUNTER = "torch.utils.flop_counter"


class _Formulas(MetaPathFinder):
    """Registers formulas when the counter is imported; importing it here would import Triton."""

    def __init__(self):
        self.waiting: list[tuple] = []

    def find_spec(self, name: str, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None  # of a module of torch
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            for operator, formula in self.waiting:
                module.register_flop_formula(operator)(formula)

        loader.exec_module = exec_module
        return spec


_formulas = _Formulas()
if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _formulas)


def register(operator, formula: Callable[..., int]) -> None:
    """Register ``formula``, a function of shapes, for ``operator`` with the FLOP counter."""
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(operator)(formula)
    else:
        _formulas.waiting.append((operator, formula))


def token_shape(x: Shape, width: int, split: Sequence[int]) -> tuple[int, int, int]:
    """(B, T, ``width``) for a map and ``split`` = (kernel_size, stride, padding)."""
    h, w = output_size(x[2], x[3], *split)
    return x[0], h * w, width


def soft_split_linear(x: Shape, weight: Shape, split: Sequence[int]) -> int:
    batch, tokens, outputs = token_shape(x, weight[0], split)
    return 2 * batch * tokens * outputs * weight[1]


def soft_split_linear_backward(x: Shape, weight: Shape, split: Sequence[int], need_x: bool) -> int:
    """One product for the gradients of weight and norm, and one for the map."""
    return soft_split_linear(x, weight, split) * (1 + need_x)


def performer_attention(v: Shape, features: int) -> int:
    """w·k, w·q, Σ φ(k) vᵀ, φ(q) S and the normaliser φ(q) Σ φ(k)."""
    batch, tokens, embed = v
    return 2 * batch * tokens * features * (4 * embed + 1)


def performer_attention_backward(v: Shape, features: int) -> int:
    """Products with the constant w have one gradient, all others two."""
    batch, tokens, embed = v
    return 2 * batch * tokens * features * (6 * embed + 2)


def token_attention(v: Shape) -> int:
    """The products for the scores and for the weighted values."""
    batch, tokens, embed = v
    return 4 * batch * tokens**2 * embed


def layer_tail(v: Shape, hidden: int) -> int:
    """The products of proj and of the MLP."""
    batch, tokens, embed = v
    return 2 * batch * tokens * embed * (embed + 2 * hidden)
