"""Names of parameters in test ids."""

import torch


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value.__name__
