"""Operations of the matrix products, two per multiply-add, for ``torch.utils.flop_counter``.

Only what the mathematics needs: what a backward computes again, to save memory, does not count.
Arguments are shapes, named as in the operations' documentation.
"""

from collections.abc import Sequence

from t2t_kernels.arguments import output_size

Shape = Sequence[int]


def token_shape(x: Shape, width: int, split: Sequence[int]) -> tuple[int, int, int]:
    """(B, T, ``width``) of a map and ``split``, its kernel_size, stride and padding."""
    h, w = output_size(x[2], x[3], *split)
    return x[0], h * w, width


def soft_split_linear(x: Shape, weight: Shape, split: Sequence[int]) -> int:
    batch, tokens, outputs = token_shape(x, weight[0], split)
    return 2 * batch * tokens * outputs * weight[1]


def soft_split_linear_backward(x: Shape, weight: Shape, split: Sequence[int], need_x: bool) -> int:
    """One product gives the gradients of weight and norm, another one that of the map."""
    return soft_split_linear(x, weight, split) * (1 + need_x)


def performer_attention(v: Shape, features: int) -> int:
    """w·k, w·q, Σ φ(k) vᵀ, φ(q) S and the normaliser φ(q) Σ φ(k)."""
    batch, tokens, embed = v
    return 2 * batch * tokens * features * (4 * embed + 1)


def performer_attention_backward(v: Shape, features: int) -> int:
    """The products with the constant w have one gradient, the others two."""
    batch, tokens, embed = v
    return 2 * batch * tokens * features * (6 * embed + 2)


def token_attention(v: Shape) -> int:
    """The scores and the values that they weigh."""
    batch, tokens, embed = v
    return 4 * batch * tokens**2 * embed


def layer_tail(v: Shape, hidden: int) -> int:
    """proj and the two products of the MLP."""
    batch, tokens, embed = v
    return 2 * batch * tokens * embed * (embed + 2 * hidden)
