"""The contract of the T2T layers. No backend fuses them yet."""

from t2t_kernels.backends import register_operation

PERFORMER_LAYER = register_operation(
    "performer_layer", parts=("soft_split_linear", "performer_attention")
)
TRANSFORMER_LAYER = register_operation(
    "transformer_layer", parts=("soft_split_linear", "token_attention")
)
