"""Bad input to models gives a clear error with argument, got and expected."""

import pytest
import torch

from t2t_kernels import BackendUnavailable
from t2tvit import create_model
from t2tvit.errors import InputError

CONSTRUCTION = [
    ("t2t_vit14", {}, r"unknown model 't2t_vit14'; did you mean 't2t_vit_14'\?"),
    ("resnet50", {}, r"unknown model 'resnet50'"),
    (14, {}, r"unknown model 14"),
    ("t2t_vit_7", {"drop_pat_rate": 0.1}, r"drop_pat_rate'; did you mean 'drop_path_rate'\?"),
    ("t2t_vit_dense", {"depth": 3}, r"unknown option of t2t_vit_dense 'depth'"),
    ("t2t_vit_7", {"fused_kernels": "tritn"}, r"unknown backend 'tritn'; did you mean 'triton'\?"),
    ("t2t_vit_7", {"tokens_type": "performr"}, r"did you mean 'performer'\?"),
    ("t2t_vit_7", {"img_size": 15}, r"img_size: got 15, expected at least 16"),
    ("t2t_vit_7", {"img_size": (224, 8)}, r"img_size: got 8, expected at least 16"),
    ("t2t_vit_7", {"img_size": 224.0}, r"img_size: got 224\.0, expected an integer or"),
    ("t2t_vit_7", {"img_size": (224, "224")}, r"img_size: got '224', expected an integer"),
    ("t2t_vit_7", {"img_size": (3, 224, 224)}, r"img_size: got \(3, 224, 224\), expected an"),
    ("t2t_vit_7", {"img_size": "22"}, r"img_size: got '22', expected an integer or"),
    ("t2t_vit_7", {"img_size": True}, r"img_size: got True, expected an integer"),
    ("t2t_vit_7", {"num_classes": -1}, r"num_classes: got -1, expected at least 0"),
    ("t2t_vit_7", {"num_classes": "10"}, r"num_classes: got '10', expected an integer"),
    ("t2t_vit_7", {"in_chans": 0}, r"in_chans: got 0, expected at least 1"),
    ("t2t_vit_7", {"token_dim": 1}, r"token_dim: got 1, expected at least 2"),
    ("t2t_vit_7", {"depth": 0}, r"depth: got 0, expected at least 1"),
    ("t2t_vit_7", {"embed_dim": 0}, r"embed_dim: got 0, expected at least 1"),
    ("t2t_vit_7", {"num_heads": 3}, r"num_heads: got 3, expected a divisor of the width 256"),
    ("t2t_vit_7", {"num_heads": 0}, r"num_heads: got 0, expected at least 1"),
    ("t2t_vit_7", {"mlp_ratio": 0}, r"mlp_ratio: got 0, expected a positive number"),
    ("t2t_vit_7", {"qk_scale": "x"}, r"qk_scale: got 'x', expected a number"),
    ("t2t_vit_7", {"drop_path_rate": 1.0}, r"drop_path_rate: got 1\.0, expected at least 0 and"),
    ("t2t_vit_7", {"drop_rate": -0.1}, r"drop_rate: got -0\.1"),
    ("t2t_vit_7", {"attn_drop_rate": "0.1"}, r"attn_drop_rate: got '0\.1', expected a number"),
    ("t2t_vit_16_ghost", {"mlp_ratio": 4}, r"mlp_ratio: got 4, expected 3 for the Ghost MLP"),
    ("t2t_vit_16_ghost", {"embed_dim": 9, "num_heads": 3}, r"embed_dim: got 9.* even"),
    ("t2t_vit_14_se", {"embed_dim": 12}, r"embed_dim: got 12.* at least 16"),
    ("t2t_vit_dense", {"growth_rate": 60}, r"num_heads: got 8, expected a divisor"),
    ("t2t_vit_dense", {"stages": (1, 0)}, r"stages: got 0, expected at least 1"),
]


@pytest.mark.parametrize("name, options, message", CONSTRUCTION)
def test_bad_construction(name, options, message):
    with pytest.raises(InputError, match=message):
        create_model(name, **options)


@pytest.fixture(scope="module")
def model():
    return create_model("t2t_vit_7", depth=1, img_size=32).eval()


INPUTS = [
    (torch.zeros(3, 32, 32), r"x: got shape \(3, 32, 32\), expected \(B, 3, H, W\)"),
    (torch.zeros(1, 1, 32, 32), r"x: got shape \(1, 1, 32, 32\), expected \(B, 3, H, W\)"),
    (torch.zeros(1, 3, 32, 15), r"x: got shape \(1, 3, 32, 15\), .* at least 16"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"x: got torch\.uint8"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.float64), r"float64"),
    ([[1.0]], r"x: got list, expected a torch\.Tensor"),
]


@pytest.mark.parametrize("x, message", INPUTS)
def test_bad_images(model, x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model(x)


def test_images_on_another_device():
    with torch.device("meta"):
        model = create_model("t2t_vit_7", depth=1, img_size=32)
    with pytest.raises(ValueError, match="x: got device cpu, the model is on meta"):
        model(torch.zeros(1, 3, 32, 32))


def test_a_backend_that_cannot_run_says_why_at_the_first_forward():
    """CUDA C++ does not support CPU tensors, whether it is built or not."""
    model = create_model("t2t_vit_7", depth=1, img_size=32, fused_kernels="cuda")
    with pytest.raises(BackendUnavailable, match="on the cuda backend"):
        model(torch.zeros(1, 3, 32, 32))
    model.set_fused_kernels("reference")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(InputError, match="did you mean 'reference'"):
        model.set_fused_kernels("refrence")
