"""The models agree with the published architecture, for weights generated from their names."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from t2tvit import create_model

GOLDEN = Path(__file__).with_name("golden")
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def weight_from_name(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    r = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape)
    if name.endswith(".w"):
        r *= math.sqrt(0.5)
    elif name == "cls_token":
        r *= 0.5
    elif len(shape) >= 2:
        r /= math.sqrt(math.prod(shape[1:]))
        if name.endswith("kqv.weight"):
            r *= 0.4
    elif name.endswith("weight"):
        r = 1 + 0.1 * r
    else:
        r *= 0.1
    return torch.from_numpy(r)


def golden_model(name: str, fused_kernels: str, dtype: torch.dtype):
    model = create_model(name, fused_kernels=fused_kernels).to(dtype).eval()
    state = model.state_dict()
    for key, tensor in state.items():
        if key != "pos_embed":
            tensor.copy_(weight_from_name(key, tuple(tensor.shape)))
    return model


def relative_error(got, expected) -> float:
    """The largest difference, relative to the largest expected value."""
    got = torch.as_tensor(got).detach().double().numpy()
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}"
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# Tolerances of what is stored as float32, of the loss, and of the gradient norms.
TOLERANCES = {torch.float64: (1e-6, 1e-9, 1e-9), torch.float32: (1e-4, 1e-4, 1e-3)}

CASES = [(name, "reference", dtype) for name in NAMES for dtype in TOLERANCES]
# The two kinds of T2T module, on the backends that this machine prefers.
CASES += [(name, "auto", torch.float32) for name in ("t2t_vit_7", "t2t_vit_t_14")]


def test_five_models_have_golden_values():
    assert NAMES == [
        "t2t_vit_14",
        "t2t_vit_14_se",
        "t2t_vit_7",
        "t2t_vit_dense",
        "t2t_vit_t_14",
    ]


@pytest.mark.parametrize("name, fused_kernels, dtype", CASES, ids=str)
def test_golden(name, fused_kernels, dtype):
    tolerance, loss_tolerance, grad_tolerance = TOLERANCES[dtype]
    golden = np.load(GOLDEN / f"{name}.npz")
    model = golden_model(name, fused_kernels, dtype)
    x = torch.from_numpy(np.random.RandomState(0).randn(2, 3, 224, 224)).to(dtype)

    with torch.no_grad():
        tokens = model.tokens_to_token(x)
    features = model.forward_features(x)
    logits = model.forward_head(features)
    loss = F.cross_entropy(logits, torch.tensor([1, 7]))
    loss.backward()

    got = {
        "pos_embed": model.pos_embed[:, ::7, ::16],
        "tokens": tokens[:, ::14, ::16],
        "features": features[:, 0],
        "logits": logits,
    }
    errors = {key: relative_error(value, golden[key]) for key, value in got.items()}
    too_large = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not too_large, f"relative errors above {tolerance:g}: {too_large}"

    loss_error = abs(loss.item() / golden["loss"] - 1)
    assert loss_error <= loss_tolerance, f"loss is off by {loss_error:.2e}"

    norms = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.requires_grad}
    assert set(norms) == set(golden["grad_names"])
    worst, key = max(
        (abs(norms[key] / norm - 1), key)
        for key, norm in zip(golden["grad_names"], golden["grad_norms"], strict=True)
    )
    assert worst <= grad_tolerance, f"the gradient norm of {key} is off by {worst:.2e}"
