"""Random parameters of the T2T layers."""

import torch

from t2t_kernels import PerformerLayerParams, TransformerLayerParams


def random(*shape, scale=1.0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype) * scale


def performer_params(width, embed=6, features=4, hidden=5, dtype=torch.float64):
    return PerformerLayerParams(
        w=random(features, embed, dtype=dtype),
        norm1_weight=1 + random(width, scale=0.1, dtype=dtype),
        norm1_bias=random(width, scale=0.1, dtype=dtype),
        kqv_weight=random(3 * embed, width, scale=width**-0.5, dtype=dtype),
        kqv_bias=random(3 * embed, scale=0.1, dtype=dtype),
        proj_weight=random(embed, embed, scale=embed**-0.5, dtype=dtype),
        proj_bias=random(embed, scale=0.1, dtype=dtype),
        norm2_weight=1 + random(embed, scale=0.1, dtype=dtype),
        norm2_bias=random(embed, scale=0.1, dtype=dtype),
        mlp_0_weight=random(hidden, embed, scale=embed**-0.5, dtype=dtype),
        mlp_0_bias=random(hidden, scale=0.1, dtype=dtype),
        mlp_2_weight=random(embed, hidden, scale=hidden**-0.5, dtype=dtype),
        mlp_2_bias=random(embed, scale=0.1, dtype=dtype),
    )


def transformer_params(width, embed=6, hidden=5, dtype=torch.float64):
    p = performer_params(width, embed, hidden=hidden, dtype=dtype)
    return TransformerLayerParams(
        p.norm1_weight,
        p.norm1_bias,
        p.kqv_weight,
        p.proj_weight,
        p.proj_bias,
        p.norm2_weight,
        p.norm2_bias,
        p.mlp_0_weight,
        p.mlp_0_bias,
        p.mlp_2_weight,
        p.mlp_2_bias,
    )
