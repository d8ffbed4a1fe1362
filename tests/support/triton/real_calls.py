"""The launchers' calls in a training step at 224×224 pixels, on tensors without storage."""

import functools

import torch

from t2t_kernels.performer_attention import triton as performer_attention
from t2t_kernels.performer_layer import triton as performer_layer
from t2t_kernels.soft_split import triton as soft_split
from t2t_kernels.soft_split_linear import triton as soft_split_linear
from t2t_kernels.token_attention import triton as token_attention
from t2t_kernels.transformer_layer import triton as transformer_layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 128
# Channels, side of the map, kernel_size, stride, padding, whether the map's gradient is asked for.
LAYERS = {
    "layer1": (3, 224, (7, 4, 2), False),
    "layer2": (64, 56, (3, 2, 1), True),
}
# E and the MLP's width at their limits, and all of E, m and M at theirs.
WIDE, LARGEST = (128, 64, 128), (128, 128, 128)


def tensor(*shape, dtype, channels_last=False):
    empty = torch.empty(shape, dtype=dtype, device="meta")
    return empty.contiguous(memory_format=torch.channels_last) if channels_last else empty


def splits(dtype):
    x = tensor(BATCH, 3, 224, 224, dtype=dtype)
    tokens = soft_split.soft_split(x, 7, 4, 2)
    soft_split.soft_split_backward(tokens, 224, 224, 7, 4, 2, True)


def project(dtype):
    x = tensor(BATCH, 64, 28, 28, dtype=dtype, channels_last=True)
    weight, bias = tensor(384, 576, dtype=dtype), tensor(384, dtype=dtype)
    y = soft_split_linear.soft_split_linear(x, weight, bias, None, None, 3, 2, 1, 1e-5)
    soft_split_linear.soft_split_linear_backward(y, x, weight, None, None, 3, 2, 1, 1e-5, True)


def projection(layer, dtype):
    channels, size, split, need_x = LAYERS[layer]
    x = tensor(BATCH, channels, size, size, dtype=dtype, channels_last=channels > 3)
    width = channels * split[0] ** 2
    weight, norm = tensor(192, width, dtype=dtype), tensor(width, dtype=dtype)
    y = soft_split_linear.soft_split_linear(x, weight, None, norm, norm, *split, 1e-5)
    soft_split_linear.soft_split_linear_backward(y, x, weight, norm, norm, *split, 1e-5, need_x)


def attention(dtype, embed=64, features=32, features_dtype=torch.float32):
    k, q, v = (tensor(BATCH, 3136, embed, dtype=dtype) for _ in range(3))
    w = tensor(features, embed, dtype=features_dtype)
    y, *sums = performer_attention.performer_attention(k, q, v, w, 1e-8)
    performer_attention.performer_attention_backward(y, k, q, v, w, *sums, 1e-8)


def performer(layer, dtype, embed=64, features=32, hidden=64, features_dtype=torch.float32):
    channels, size, split, need_x = LAYERS[layer]
    x = tensor(BATCH, channels, size, size, dtype=dtype, channels_last=channels > 3)
    width = channels * split[0] ** 2
    shapes = ((width,), (width,), (3 * embed, width), (3 * embed,), (embed, embed), *[(embed,)] * 3)
    shapes += ((hidden, embed), (hidden,), (embed, hidden), (embed,))
    w = tensor(features, embed, dtype=features_dtype)
    params = [w, *(tensor(*shape, dtype=dtype) for shape in shapes)]
    seed = tensor(1, dtype=torch.int64)
    numbers = (*split, 1e-8, 0.1)
    y, *sums = performer_layer.performer_layer(x, *params, seed, *numbers)
    performer_layer.performer_layer_backward(y, x, *params, seed, *sums, *numbers, need_x)


def softmax(tokens, dtype, embed=64):
    q, k, v = (tensor(BATCH, tokens, embed, dtype=dtype) for _ in range(3))
    y, attended, *statistics = token_attention.token_attention(q, k, v, 147**-0.5)
    attended = y if dtype == torch.float32 else attended
    token_attention.token_attention_backward(y, q, k, v, attended, *statistics, 147**-0.5)


def transformer(layer, dtype, embed=64, hidden=64):
    channels, size, split, need_x = LAYERS[layer]
    x = tensor(BATCH, channels, size, size, dtype=dtype, channels_last=channels > 3)
    width = channels * split[0] ** 2
    shapes = ((width,), (width,), (3 * embed, width), (embed, embed), *[(embed,)] * 3)
    shapes += ((hidden, embed), (hidden,), (embed, hidden), (embed,))
    params = [tensor(*shape, dtype=dtype) for shape in shapes]
    numbers = (*split, width**-0.5)
    y, *saved = transformer_layer.transformer_layer(x, *params, *numbers)
    transformer_layer.transformer_layer_backward(y, x, *params, *saved, *numbers, need_x)


CALLS = {}
for _name, _dtype in DTYPES.items():
    CALLS[f"soft_split-{_name}"] = lambda dtype=_dtype: splits(dtype)
    CALLS[f"attention-{_name}"] = lambda dtype=_dtype: attention(dtype)
    CALLS[f"softmax-3136-{_name}"] = lambda dtype=_dtype: softmax(3136, dtype)
    CALLS[f"softmax-784-{_name}"] = lambda dtype=_dtype: softmax(784, dtype)
    CALLS[f"softmax-wide-{_name}"] = lambda dtype=_dtype: softmax(784, dtype, embed=128)
    CALLS[f"project-{_name}"] = lambda dtype=_dtype: project(dtype)
    for _layer in LAYERS:
        CALLS[f"{_layer}-{_name}"] = lambda layer=_layer, dtype=_dtype: projection(layer, dtype)
        CALLS[f"performer-{_layer}-{_name}"] = lambda layer=_layer, dtype=_dtype: performer(
            layer, dtype
        )
        CALLS[f"transformer-{_layer}-{_name}"] = lambda layer=_layer, dtype=_dtype: transformer(
            layer, dtype
        )
    CALLS[f"attention-wide-{_name}"] = lambda dtype=_dtype: attention(dtype, *WIDE[:2])
    CALLS[f"transformer-wide-{_name}"] = lambda dtype=_dtype: transformer("layer2", dtype, 128, 128)
    CALLS[f"performer-wide-{_name}"] = lambda dtype=_dtype: performer("layer2", dtype, *WIDE)
    CALLS[f"attention-largest-{_name}"] = lambda dtype=_dtype: attention(dtype, *LARGEST[:2])
    CALLS[f"performer-largest-{_name}"] = lambda dtype=_dtype: performer("layer2", dtype, *LARGEST)


def random_features(dtype, features_dtype):
    """Every kernel with random features, with small sizes, because it is only compiled."""
    attention(dtype, 16, 16, features_dtype)
    performer("layer1", dtype, 16, 16, 16, features_dtype)


for _name, _dtype in DTYPES.items():
    for _features, _features_dtype in DTYPES.items():
        CALLS[f"features-{_features}-{_name}"] = functools.partial(
            random_features, _dtype, _features_dtype
        )
