"""What the log says of a model."""

from dataclasses import replace

import torch

from t2tvit.models import create_model
from t2tvit.training.config import RunConfig
from t2tvit.training.model import backend_lines

CPU = torch.device("cpu")
CONFIG = RunConfig(data="synthetic:36", model="t2t_vit_7", amp="none", fused_kernels="auto")


def operations(model, **changes):
    """By operation, the backend that the log names."""
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


def test_the_log_takes_the_model_s_sizes():
    module = create_model("t2t_vit_7", img_size=32, token_dim=144).tokens_to_token
    assert module.operation_sizes() == {
        "performer_layer": {
            **{"E": 144, "m": 72, "M": 144},
            **{"channels": 3, "kernel_size": 7, "stride": 4},
        },
        "soft_split_linear": {"channels": 144, "kernel_size": 3, "stride": 2, "outputs": 256},
    }
