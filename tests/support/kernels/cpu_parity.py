"""Parity of the CPU kernels, in a process whose environment chooses their instruction set.

Usage: T2T_CPU_ISA=ISA python -m tests.support.kernels.cpu_parity
"""

import torch

from tests.support.kernels import (
    performer_attention,
    performer_layer,
    soft_split_linear,
    token_attention,
    transformer_layer,
)
from tests.support.kernels.layouts import LAYOUTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parity_of_every_operation() -> None:
    """Every operation in every dtype, for sizes that do not fill a vector and those of the models."""
    for dtype in DTYPES:
        for case in soft_split_linear.CASES:
            shape, split, outputs = soft_split_linear.CASES[case]
            for norm in (True, False):
                tensors = soft_split_linear.arguments(
                    shape, split, outputs, norm, True, dtype, "cpu"
                )
                for layout in LAYOUTS:
                    soft_split_linear.assert_parity(tensors, split, "cpu", layout)
        for case in performer_attention.CASES:
            tensors = performer_attention.arguments(
                performer_attention.CASES[case], 0.5, dtype, "cpu"
            )
            eps = 0.1 if case == "one-token" else 1e-8
            performer_attention.assert_parity(*tensors, eps, "cpu")
        for case in token_attention.CASES:
            tensors = token_attention.arguments(token_attention.CASES[case], 1.0, dtype, "cpu")
            token_attention.assert_parity(tensors, 0.1, "cpu")
        for case in ("odd", "narrow", "layer1"):
            tensors, split = performer_layer.arguments(case, dtype, "cpu")
            # With eps one exponent would decide the errors of gradients that it makes tiny.
            performer_layer.assert_parity(tensors, split, "cpu", dropout_p=0.1, seed=9, eps=0.0)
            tensors, split = transformer_layer.arguments(case, dtype, "cpu")
            transformer_layer.assert_parity(tensors, split, "cpu")


if __name__ == "__main__":
    parity_of_every_operation()
