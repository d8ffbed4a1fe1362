"""The tensors of a Performer T2T layer, named as in the state dict with dots as underscores.

n = C·k·k is the width of an input token, E the width of an output token, m the number of random
features, M the hidden width of the MLP.
"""

from typing import NamedTuple

from torch import Tensor


class PerformerLayerParams(NamedTuple):
    w: Tensor  # (m, E), constant: it receives no gradient
    norm1_weight: Tensor  # (n,)
    norm1_bias: Tensor  # (n,)
    kqv_weight: Tensor  # (3E, n), in the order k, q, v
    kqv_bias: Tensor  # (3E,)
    proj_weight: Tensor  # (E, E)
    proj_bias: Tensor  # (E,)
    norm2_weight: Tensor  # (E,)
    norm2_bias: Tensor  # (E,)
    mlp_0_weight: Tensor  # (M, E)
    mlp_0_bias: Tensor  # (M,)
    mlp_2_weight: Tensor  # (E, M)
    mlp_2_bias: Tensor  # (E,)

    def sizes(self, channels: int, kernel_size: int, stride: int) -> dict[str, int]:
        """The sizes that kernels may not support, for a map with ``channels`` channels."""
        return {
            "E": self.w.shape[1],
            "m": self.w.shape[0],
            "M": self.mlp_0_weight.shape[0],
            "channels": channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "outputs": self.kqv_weight.shape[0],
        }
