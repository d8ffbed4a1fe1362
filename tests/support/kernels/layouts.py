"""Maps in every layout of memory."""

import torch


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def misaligned(x):
    """Contiguous, but one element off the vector alignment."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = flat[1:].view(x.shape)
    return view.copy_(x)


def sliced(x):
    """Every second column and channel of a larger map."""
    batch, channels, height, width = x.shape
    wide = torch.full(
        (batch, 2 * channels, height, 2 * width), torch.nan, dtype=x.dtype, device=x.device
    )
    wide[:, ::2, :, 1::2] = x
    return wide[:, ::2, :, 1::2]


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = [contiguous, channels_last, misaligned, sliced, transposed]
