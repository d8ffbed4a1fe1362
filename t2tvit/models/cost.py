"""What a model's forward costs, counted and not timed."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2tvit.models.t2t_module import T2TModule


def multiply_adds(model: nn.Module, img_size: tuple[int, int], in_chans: int = 3) -> int:
    """Multiply-adds of all matrix products and convolutions of one image's forward.

    Counted while a copy of the model without memory runs an image of ``img_size`` in plain PyTorch;
    norms, activations and the like are left out, as in published figures.
    """
    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        if isinstance(module, T2TModule):
            module.set_fused_kernels("reference")
    dtype = next(model.parameters()).dtype
    images = torch.empty(1, in_chans, *img_size, device="meta", dtype=dtype)
    # The one attention that is made of products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2
