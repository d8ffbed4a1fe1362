"""The contract of Performer attention. No backend fuses it yet."""

from t2t_kernels.backends import register_operation

PERFORMER_ATTENTION = register_operation("performer_attention")
