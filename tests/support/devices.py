"""Where the kernels run in the tests."""

import torch

from t2t_kernels.backends import Backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The backend "cuda" in the host build, which the fixture ``cuda_on_host`` loads.
CUDA_ON_HOST = Backend("cuda", devices=("cpu",), namespace="t2t_cuda")
