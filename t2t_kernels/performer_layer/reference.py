"""The Performer T2T layer, composed of smaller operations: the specification of the fused layer.

``backend`` is used for these operations; with "reference" everything is plain PyTorch.
"""

import torch.nn.functional as F
from torch import Tensor

from t2t_kernels.performer_attention.api import performer_attention
from t2t_kernels.performer_layer.params import PerformerLayerParams
from t2t_kernels.philox import dropout
from t2t_kernels.soft_split_linear.api import soft_split_linear

# The dropouts of one layer draw from different counters.
AFTER_PROJ, AFTER_MLP = 0, 1


def performer_layer(
    x: Tensor,
    params: PerformerLayerParams,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str | None,
) -> Tensor:
    kqv = soft_split_linear(
        x,
        params.kqv_weight,
        params.kqv_bias,
        params.norm1_weight,
        params.norm1_bias,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        backend=backend,
    )
    k, q, v = kqv.chunk(3, dim=-1)
    y = performer_attention(k, q, v, params.w, eps=eps, backend=backend)
    # v is the skip, because the unfolded tokens have another width (C·k·k).
    y = F.linear(y, params.proj_weight, params.proj_bias)
    y = v + dropout(y, dropout_p, seed, AFTER_PROJ)
    z = F.layer_norm(y, y.shape[-1:], params.norm2_weight, params.norm2_bias)
    z = F.gelu(F.linear(z, params.mlp_0_weight, params.mlp_0_bias))
    z = F.linear(z, params.mlp_2_weight, params.mlp_2_bias)
    return y + dropout(z, dropout_p, seed, AFTER_MLP)
