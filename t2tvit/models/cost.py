"""Counts the multiply-adds of a model's forward."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2tvit.models.t2t_module import T2TModule


def multiply_adds(model: nn.Module, img_size: tuple[int, int], in_chans: int = 3) -> int:
    """Multiply-adds of all matrix products and convolutions in the forward of one image.

    They are counted in plain PyTorch on the meta device for an image of ``img_size``. Norms,
    activations and the like are not counted, as in published figures.
    """
    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        if isinstance(module, T2TModule):
            module.set_fused_kernels("reference")
    dtype = next(model.parameters()).dtype
    images = torch.empty(1, in_chans, *img_size, device="meta", dtype=dtype)
    # The only attention that consists of products, so that they are counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2
