"""Fused kernels for Tokens-to-Token Vision Transformers: the public functions."""

import warnings

from t2t_kernels.arguments import output_size
from t2t_kernels.backends import BACKENDS, use_backend
from t2t_kernels.errors import BackendUnavailable
from t2t_kernels.performer_attention.api import performer_attention
from t2t_kernels.performer_layer.api import PerformerLayerParams, performer_layer
from t2t_kernels.shadowing import why_shadowed
from t2t_kernels.soft_split.api import soft_split
from t2t_kernels.soft_split_linear.api import soft_split_linear
from t2t_kernels.token_attention.api import token_attention
from t2t_kernels.transformer_layer.api import TransformerLayerParams, transformer_layer

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "PerformerLayerParams",
    "TransformerLayerParams",
    "output_size",
    "performer_attention",
    "performer_layer",
    "soft_split",
    "soft_split_linear",
    "token_attention",
    "transformer_layer",
    "use_backend",
]

if (_shadowed := why_shadowed()) is not None:
    warnings.warn(_shadowed, RuntimeWarning, stacklevel=2)
