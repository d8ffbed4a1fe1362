"""What the Triton kernels share."""

import contextlib

import torch
from torch import Tensor

# The interpreter runs kernels on CPU tensors, for the tests.
from t2t_kernels.backends import DEVICE_TYPES

IMPL_DEVICES = tuple(sorted(DEVICE_TYPES["triton"]))


def device_guard(tensor: Tensor):
    """Launch on the device that holds ``tensor``, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
