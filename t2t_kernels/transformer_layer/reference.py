"""The transformer T2T layer, composed of smaller operations: the specification of the fused layer.

``backend`` is used for these operations; with "reference" everything is plain PyTorch.
"""

import torch.nn.functional as F
from torch import Tensor

from t2t_kernels.soft_split_linear.api import soft_split_linear
from t2t_kernels.token_attention.api import token_attention
from t2t_kernels.transformer_layer.params import TransformerLayerParams


def transformer_layer(
    x: Tensor,
    params: TransformerLayerParams,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float,
    backend: str | None,
) -> Tensor:
    qkv = soft_split_linear(
        x,
        params.attn_qkv_weight,
        None,
        params.norm1_weight,
        params.norm1_bias,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        backend=backend,
    )
    q, k, v = qkv.chunk(3, dim=-1)
    y = token_attention(q, k, v, scale=scale, backend=backend)
    y = v + F.linear(y, params.attn_proj_weight, params.attn_proj_bias)
    z = F.layer_norm(y, y.shape[-1:], params.norm2_weight, params.norm2_bias)
    z = F.gelu(F.linear(z, params.mlp_fc1_weight, params.mlp_fc1_bias))
    return y + F.linear(z, params.mlp_fc2_weight, params.mlp_fc2_bias)
