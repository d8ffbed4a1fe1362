"""The contract of softmax token attention. No backend fuses it yet."""

from t2t_kernels.backends import register_operation

TOKEN_ATTENTION = register_operation("token_attention")
