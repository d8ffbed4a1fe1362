"""Launches of unusual sizes, recorded and not run: a GPU refuses a grid that is too large."""

import ctypes

import pytest
import torch

from tests.support.cuda.build import build_host_library
from tests.support.kernels.params import performer_params, transformer_params

pytestmark = pytest.mark.slow

# One more than the limit of a grid's second and third dimension.
IMAGES = 65536
HALF = torch.bfloat16


def soft_split(ops):
    tokens = ops.soft_split(torch.empty(IMAGES, 1, 2, 2), 1, 1, 0)
    ops.soft_split_backward(tokens, 2, 2, 1, 1, 0, True)


def projection_of_images(ops):
    x, weight = torch.empty(IMAGES, 1, 2, 2, dtype=HALF), torch.empty(8, 1, dtype=HALF)
    y = ops.soft_split_linear(x, weight, None, None, None, 1, 1, 0, 1e-5)
    ops.soft_split_linear_backward(y, x, weight, None, None, 1, 1, 0, 1e-5, True)


def projection_of_maps(ops):
    x, weight = torch.empty(IMAGES, 64, 2, 2, dtype=HALF), torch.empty(8, 64, dtype=HALF)
    y = ops.soft_split_linear(x, weight, None, None, None, 1, 1, 0, 1e-5)
    ops.soft_split_linear_backward(y, x, weight, None, None, 1, 1, 0, 1e-5, True)


def performer_attention(ops):
    k, w = torch.empty(IMAGES, 1, 64, dtype=HALF), torch.empty(32, 64)
    y, *sums = ops.performer_attention(k, k, k, w, 1e-8)
    ops.performer_attention_backward(y, k, k, k, w, *sums, 1e-8)


def token_attention(ops):
    q = torch.empty(IMAGES, 1, 64, dtype=HALF)
    y, *saved = ops.token_attention(q, q, q, 1.0)
    ops.token_attention_backward(y, q, q, q, *saved, 1.0)


def performer_layer(ops):
    x, params = torch.empty(IMAGES, 1, 1, 1, dtype=HALF), performer_params(1, 64, 32, 64, HALF)
    rest = (1, 1, 0, 1e-8, 0.0)
    y, *sums = ops.performer_layer(x, *params, None, *rest)
    ops.performer_layer_backward(y, x, *params, None, *sums, *rest, True)


def transformer_layer(ops):
    x, params = torch.empty(IMAGES, 1, 1, 1, dtype=HALF), transformer_params(1, 64, 64, HALF)
    y, *saved = ops.transformer_layer(x, *params, 1, 1, 0, 1.0)
    ops.transformer_layer_backward(y, x, *params, *saved, 1, 1, 0, 1.0, True)


CALLS = [
    soft_split,
    projection_of_images,
    projection_of_maps,
    performer_attention,
    token_attention,
    performer_layer,
    transformer_layer,
]


@pytest.fixture
def launches_of(host_cache, cuda_backend):
    """Records the launches of a call without running them."""
    record = ctypes.CDLL(build_host_library(host_cache)).simt_record
    record.restype = ctypes.c_char_p

    def recorded(call):
        record(ctypes.c_bool(True))
        try:
            result = call()
        finally:
            launches = record(ctypes.c_bool(False))
        return result, len(launches.splitlines())

    return recorded


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_large_grids(launches_of, call):
    _, launches = launches_of(lambda: call(torch.ops.t2t_cuda))
    assert launches >= 2


@pytest.mark.parametrize(
    ("shape", "split"), [((2, 3, 28, 28), (7, 4, 2)), ((2, 64, 14, 14), (3, 2, 1))]
)
def test_launches_of_the_models_layers(launches_of, shape, split):
    """5 forward; 10 backward, 13 with the map's gradient, as many whatever the number of tokens."""
    ops, x = torch.ops.t2t_cuda, torch.zeros(shape, dtype=HALF)
    params = performer_params(shape[1] * split[0] ** 2, 64, 32, 64, HALF)
    numbers = (*split, 1e-8, 0.0)
    (y, *sums), forward = launches_of(lambda: ops.performer_layer(x, *params, None, *numbers))
    assert forward <= 5
    for need_x, most in ((False, 10), (True, 13)):
        if need_x and shape[1] == 3:
            continue
        _, backward = launches_of(
            lambda: ops.performer_layer_backward(y, x, *params, None, *sums, *numbers, need_x)
        )
        assert 4 < backward <= most, need_x
