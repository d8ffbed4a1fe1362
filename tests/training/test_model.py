"""The log lines about a model."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from t2t_kernels.backends import BACKENDS, Backend
from t2tvit.models import create_model
from t2tvit.models.t2t_module import T2TModule
from t2tvit.training.config import RunConfig
from t2tvit.training.model import backend_lines

CPU = torch.device("cpu")
CONFIG = RunConfig(data="synthetic:36", model="t2t_vit_7", amp="none", fused_kernels="auto")


def operations(model, **changes):
    """The backend of each operation according to the log."""
    lines = backend_lines(model, replace(CONFIG, **changes), CPU)
    return dict(line.split()[:2] for line in lines)


def test_the_log_lists_the_operations_that_the_model_calls():
    performer, transformer, plain = (
        create_model(name, img_size=32) for name in ("t2t_vit_7", "t2t_vit_t_14", "vit_s_16")
    )
    assert operations(performer) == {"performer_layer": "cpu", "soft_split_linear": "cpu"}
    assert operations(transformer) == {"transformer_layer": "cpu", "soft_split_linear": "cpu"}
    reference = operations(performer, fused_kernels="reference")
    assert reference == {"performer_layer": "reference", "soft_split_linear": "reference"}
    assert list(backend_lines(plain, CONFIG, CPU)) == ["  t2t_vit_7 has no fused kernels"]


class Served(TorchDispatchMode):
    """A context that records calls of compiled operators as (operation, backend)."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        backend = function.namespace.removeprefix("t2t_")
        if backend != function.namespace:
            self.calls.add((function._opname, backend))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def hook(module):
    module.attention1.norm1.register_forward_hook(lambda *_: None)


def replace_projection(module):
    module.project = nn.Sequential(module.project)


@pytest.mark.filterwarnings("ignore:a T2T layer calls its submodules")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
@pytest.mark.parametrize(
    ("args", "change"),
    [
        ({}, None),
        ({"in_chans": 5}, None),
        ({"token_dim": 100}, None),
        ({"token_dim": 144}, None),
        ({"token_dim": 192}, None),
        ({"embed_dim": 252}, None),
        ({}, hook),
        ({}, replace_projection),
    ],
)
def test_the_log_names_the_backends_that_serve(args, change, tokens_type, dtype, monkeypatch):
    """With a simulated GPU; nothing is computed."""
    for name in ("triton", "cuda"):
        injected = Backend(
            name,
            devices=("cuda",),
            why_not_on_gpu=lambda device: None,
            namespace=f"t2t_{name}",
        )
        monkeypatch.setitem(BACKENDS, name, injected)
    gpu = torch.device("cuda")
    with FakeTensorMode(), gpu, default_dtype(dtype):
        module = T2TModule(tokens_type, **args)
        if change is not None and tokens_type != "convolution":
            change(module)
        with Served() as served:
            module(torch.zeros(1, args.get("in_chans", 3), 32, 32, dtype=dtype))
    amp = str(dtype).removeprefix("torch.") if dtype != torch.float32 else "none"
    lines = backend_lines(module, replace(CONFIG, amp=amp), gpu)
    named = {tuple(line.split()[:2]) for line in lines}
    assert {line for line in named if line[1] != "reference"} == served.calls
