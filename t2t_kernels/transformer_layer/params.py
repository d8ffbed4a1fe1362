"""The tensors of a transformer T2T layer, named as in the state dict with dots as underscores.

n = C·k·k is the width of an input token, E the width of an output token, M the hidden width of the
MLP.
"""

from typing import NamedTuple

from torch import Tensor


class TransformerLayerParams(NamedTuple):
    norm1_weight: Tensor  # (n,)
    norm1_bias: Tensor  # (n,)
    attn_qkv_weight: Tensor  # (3E, n), in the order q, k, v
    attn_proj_weight: Tensor  # (E, E)
    attn_proj_bias: Tensor  # (E,)
    norm2_weight: Tensor  # (E,)
    norm2_bias: Tensor  # (E,)
    mlp_fc1_weight: Tensor  # (M, E)
    mlp_fc1_bias: Tensor  # (M,)
    mlp_fc2_weight: Tensor  # (E, M)
    mlp_fc2_bias: Tensor  # (E,)

    def sizes(self, channels: int, kernel_size: int, stride: int) -> dict[str, int]:
        """The sizes that kernels may not support, for a map with ``channels`` channels."""
        return {
            "E": self.attn_proj_weight.shape[0],
            "M": self.mlp_fc1_weight.shape[0],
            "channels": channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "outputs": self.attn_qkv_weight.shape[0],
        }
