"""Rivals of the kernels, besides the eager reference in the row's own dtype.

A rival is the reference run in another way: under autocast, through torch.compile, with the soft
split as a convolution, or with one of PyTorch's own softmax attentions.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2t_kernels.soft_split_linear import reference as soft_split_linear_reference
from t2t_kernels.token_attention import reference as token_attention_reference

Call = Callable[[], Tensor]

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Rival:
    """``applies(op, size, dtype, device)`` selects its rows, ``wrap`` turns the reference's call into
    its own, and ``compiled`` says whether that uses torch.compile."""

    applies: Callable[[str, str, str, torch.device], bool]
    wrap: Callable[[Call, str, torch.device], Call]
    compiled: bool = False


def softmax(op: str) -> bool:
    return op in ("token_attention", "transformer_layer", "transformer_module")


def convolves(op: str) -> bool:
    return op == "soft_split_linear" or op.endswith(("_layer", "_module"))


def sdpa_runs(name: str, dtype: str, device: torch.device) -> bool:
    """Whether an attention of PyTorch supports the rows' tensors: one head, 64 channels, no mask."""
    if device.type == "cpu":
        return name in ("sdpa-flash", "sdpa-math")
    return dtype == "bf16" or name in ("sdpa-efficient", "sdpa-math")


def best_sdpa(dtype: str, device: torch.device) -> str:
    """The fastest attention for the device, according to publications; used by compiled rivals."""
    if device.type == "cpu":
        return "sdpa-flash"
    if dtype == "fp32":
        return "sdpa-efficient"
    return "sdpa-cudnn" if torch.cuda.get_device_capability(device) >= (9, 0) else "sdpa-flash"


def autocast(call: Call, dtype: str, device: torch.device) -> Call:
    """Tensors in float32, products in bfloat16, as in most training code."""

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    return run


def with_sdpa(name: str) -> Callable[[Call, str, torch.device], Call]:
    def wrap(call: Call, dtype: str, device: torch.device) -> Call:
        def run() -> Tensor:
            with pytorch_attention(name):
                return call()

        return run

    return wrap


def compiled(
    mode: str | None = None,
    soft_split_linear: Callable[..., Tensor] = soft_split_linear_reference.soft_split_linear,
) -> Callable[[Call, str, torch.device], Call]:
    """The reference with torch.compile and PyTorch's best softmax attention."""

    def wrap(call: Call, dtype: str, device: torch.device) -> Call:
        # So that earlier rows do not count towards dynamo's limit of recompilations.
        torch.compiler.reset()
        graph = torch.compile(call, mode=mode, fullgraph=True, dynamic=False)

        def run() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with (
                pytorch_attention(best_sdpa(dtype, device)),
                mock.patch.object(
                    soft_split_linear_reference, "soft_split_linear", soft_split_linear
                ),
            ):
                return graph()

        return run

    return wrap


@contextlib.contextmanager
def pytorch_attention(name: str) -> Iterator[None]:
    """A context in which the reference uses PyTorch's attention with the SDPA backend ``name``."""
    with (
        sdpa_kernel(SDPA[name]),
        mock.patch.object(token_attention_reference, "token_attention", scaled_dot_product),
    ):
        yield


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(1)


def sdpa_applies(name: str) -> Callable[[str, str, str, torch.device], bool]:
    """A function that says whether the SDPA backend ``name`` applies to a row."""
    return lambda op, size, dtype, device: softmax(op) and sdpa_runs(name, dtype, device)


def convolution_form(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    eps: float,
    backend: str | None,
) -> Tensor:
    """Soft split, LayerNorm and Linear as one convolution and two scalars per token.

    With W_g = W·diag(γ), y = r (W_g u − μ W_g·1) + W β + b. μ and 1/r² − eps are the mean and the
    variance of the patch u, including its zero padding.
    """
    kernel = weight if norm_weight is None else weight * norm_weight
    filters = kernel.unflatten(1, (x.shape[1], kernel_size, kernel_size))
    y = F.conv2d(x, filters, stride=stride, padding=padding)
    # PyTorch's attentions need adjacent channels.
    y = y.flatten(2).transpose(1, 2).contiguous()
    if norm_bias is None:
        return y if bias is None else y + bias
    moments = torch.stack([x.float().mean(1), x.float().square().mean(1)], 1)
    moments = F.avg_pool2d(moments, kernel_size, stride, padding).flatten(2).transpose(1, 2)
    mean, square = moments.split(1, dim=2)
    inverse = (square - mean.square()).clamp(min=0).add(eps).rsqrt()
    constant = weight.float() @ norm_bias.float()
    if bias is not None:
        constant = constant + bias.float()
    y = inverse * (y.float() - mean * kernel.float().sum(1)) + constant
    return y.to(x.dtype)


def convolution_form_channels_last(x: Tensor, *args, **options) -> Tensor:
    return convolution_form(x.contiguous(memory_format=torch.channels_last), *args, **options)


RIVALS = {
    # Autocast does not change the dtype of a copy.
    "autocast": Rival(
        lambda op, size, dtype, device: dtype == "bf16" and op != "soft_split", autocast
    ),
    **{name: Rival(sdpa_applies(name), with_sdpa(name)) for name in SDPA},
    "compile": Rival(lambda op, *_: True, compiled(), compiled=True),
    "compile-max-autotune": Rival(lambda op, *_: True, compiled("max-autotune"), compiled=True),
    "convolution": Rival(
        lambda op, *_: convolves(op), compiled(None, convolution_form), compiled=True
    ),
    # From the second layer on the map is channels-last already.
    "convolution-channels-last": Rival(
        lambda op, size, *_: convolves(op) and size in ("L1", "224"),
        compiled(None, convolution_form_channels_last),
        compiled=True,
    ),
}
