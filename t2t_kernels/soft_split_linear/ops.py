"""The contract of soft split + LayerNorm + Linear. No backend fuses it yet."""

from t2t_kernels.backends import register_operation

SOFT_SPLIT_LINEAR = register_operation("soft_split_linear", parts=("soft_split",))
