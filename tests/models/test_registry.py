"""Names, state dicts and parameter counts of the published models."""

import json
from pathlib import Path

import pytest
import torch

import t2tvit
from t2tvit.models import MODELS

GOLDEN = Path(__file__).with_name("golden")
STATE_DICTS = json.loads((GOLDEN / "state_dicts.json").read_text())


def test_names():
    assert set(t2tvit.list_models()) == set(STATE_DICTS)
    assert len(t2tvit.list_models()) == 14


@pytest.mark.parametrize("name", t2tvit.list_models())
def test_state_dict_and_parameter_counts(name):
    with torch.device("meta"):
        model = t2tvit.create_model(name)
    expected = STATE_DICTS[name]
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"] == MODELS[name].params
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected["trainable"]
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert all(key == "pos_embed" or key.endswith(".w") for key in frozen), frozen


@pytest.mark.parametrize(
    "name, heads",
    [
        ("t2t_vit_7", 4),
        ("t2t_vit_10", 4),
        ("t2t_vit_12", 4),
        ("t2t_vit_14", 6),
        ("t2t_vit_19", 7),
        ("t2t_vit_24", 8),
        ("t2t_vit_t_14", 6),
        ("t2t_vit_t_19", 7),
        ("t2t_vit_t_24", 8),
        ("t2t_vit_14_resnext", 32),
        ("t2t_vit_14_wide", 12),
        ("t2t_vit_14_se", 6),
        ("t2t_vit_16_ghost", 6),
        ("t2t_vit_dense", 8),
    ],
)
def test_heads_and_scale(name, heads):
    """The state dict does not depend on the number of heads."""
    with torch.device("meta"):
        attention = t2tvit.create_model(name).blocks[0].attn
    assert attention.num_heads == heads
    head_dim = attention.proj.in_features // heads
    assert attention.scale == pytest.approx(head_dim**-0.5)


@pytest.mark.parametrize("name", ["t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"])
def test_token_transformer_scale(name):
    with torch.device("meta"):
        module = t2tvit.create_model(name).tokens_to_token
    assert module.attention1.scale == pytest.approx(147**-0.5)
    assert module.attention2.scale == pytest.approx(576**-0.5)


def test_options_differ_from_the_published_configuration():
    model = t2tvit.create_model(
        "t2t_vit_7",
        img_size=(48, 80),
        num_classes=5,
        in_chans=1,
        tokens_type="transformer",
        token_dim=32,
        embed_dim=96,
        depth=2,
        num_heads=3,
        mlp_ratio=1.5,
        qk_scale=0.25,
        drop_rate=0.1,
        attn_drop_rate=0.2,
        drop_path_rate=0.3,
    )
    assert model.tokens_to_token.attention1.attn["qkv"].weight.shape == (96, 49)
    assert model.tokens_to_token.project.weight.shape == (96, 288)
    assert model.pos_embed.shape == (1, 1 + 3 * 5, 96)
    assert len(model.blocks) == 2
    block = model.blocks[1]
    assert (block.attn.num_heads, block.attn.scale, block.attn.attn_drop) == (3, 0.25, 0.2)
    assert block.mlp.fc1.weight.shape == (144, 96)
    assert (block.mlp.drop.p, block.attn.proj_drop.p, model.pos_drop.p) == (0.1, 0.1, 0.1)
    assert block.drop_path.rate == pytest.approx(0.3)
    assert model(torch.zeros(2, 1, 48, 80)).shape == (2, 5)


def test_drop_path_rates():
    with torch.device("meta"):
        plain = t2tvit.create_model("t2t_vit_14", drop_path_rate=0.13)
        dense = t2tvit.create_model("t2t_vit_dense", drop_path_rate=0.11)
    rates = [block.drop_path.rate for block in plain.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.13, 14, device="cpu").tolist())
    # A stage has one rate, and a transition follows each of the first three.
    rates = [block.drop_path.rate for block in dense.blocks if hasattr(block, "drop_path")]
    assert rates == pytest.approx([0.0] * 3 + [0.01] * 6 + [0.02] * 6 + [0.03] * 4)


def test_initial_weights():
    torch.manual_seed(0)
    model = t2tvit.create_model("t2t_vit_7")
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.tokens_to_token.attention1.kqv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any(), f"{key} does not begin at zero"
    w = model.tokens_to_token.attention1.w
    assert w.shape == (32, 64)
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)
