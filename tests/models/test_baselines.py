"""ViT and its variants on patches, compared with the paper's sizes, arithmetic and timm."""

import pytest
import torch
from torch import nn

import t2tvit
from t2tvit.errors import InputError
from t2tvit.models import BASELINES


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_baselines_are_listed_separately():
    assert not set(BASELINES) & set(t2tvit.list_models())
    assert t2tvit.list_models(baselines=True) == [*t2tvit.list_models(), *BASELINES]


def test_vit_s_has_the_published_size():
    """48.6 million parameters; the paper does not count the fixed positions."""
    with torch.device("meta"):
        assert round(trainable(t2tvit.create_model("vit_s_16")) / 1e6, 1) == 48.6


def test_vit_b_has_the_size_of_timms_except_the_qkv_bias():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", qkv_bias=False)
        ours = t2tvit.create_model("vit_b_16")
    assert sum(p.numel() for p in theirs.parameters()) == BASELINES["vit_b_16"].params
    assert sum(p.numel() for p in ours.parameters()) == BASELINES["vit_b_16"].params


@pytest.mark.parametrize("name", BASELINES)
def test_counts_and_one_step(name):
    with torch.device("meta"):
        whole = t2tvit.create_model(name)
    assert sum(parameter.numel() for parameter in whole.parameters()) == BASELINES[name].params
    small = {"stages": (1, 1)} if name == "vit_dense" else {"depth": 1, "embed_dim": 96}
    model = t2tvit.create_model(name, img_size=(32, 48), num_classes=5, num_heads=4, **small)
    x = torch.randn(2, 3, 32, 48)
    assert model.tokens_to_token(x).shape == (2, 6, model.embed_dim)
    model(x).square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert model(torch.randn(1, 3, 64, 40)).shape == (1, 5)


def test_tokens_are_linear_projections_of_patches():
    model = t2tvit.create_model("vit_s_16", img_size=32, embed_dim=32, depth=1).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    proj = model.tokens_to_token.proj
    lower_left = x[0, :, 16:, :16].flatten()
    expected = proj.weight.flatten(1) @ lower_left + proj.bias
    torch.testing.assert_close(model.tokens_to_token(x)[0, 2], expected)


def test_a_backend_that_patches_do_not_have_is_refused():
    with pytest.raises(InputError, match="fused_kernels: got 'triton', but patches have no"):
        t2tvit.create_model("vit_s_16", fused_kernels="triton")
    model = t2tvit.create_model("vit_s_16", img_size=32, depth=1, fused_kernels="reference")
    with pytest.raises(InputError, match="x: got shape"):
        model(torch.randn(1, 3, 8, 32))
