"""``T2TEmbed`` as a replacement of timm's ``PatchEmbed``."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import t2tvit
from t2tvit.errors import InputError
from tests.support.parity import assert_as_accurate

timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
optim = pytest.importorskip("timm.optim", exc_type=ImportError)

# One with a class token and absolute positions, one with neither but relative positions.
VITS = ("vit_tiny_patch16_224", "vit_relpos_small_patch16_224")
SMALL = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=3)


def build(name: str, embed_layer=t2tvit.T2TEmbed, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, embed_layer=embed_layer, **{**SMALL, **options})


@pytest.mark.parametrize("name", VITS)
def test_it_trains(name):
    model = build(name)
    torch.manual_seed(1)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.3, losses
    stem = model.patch_embed.tokens_to_token
    for key, parameter in stem.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), f"{key} has no gradient"


@pytest.mark.parametrize("name", VITS)
def test_fused_kernels_agree_with_the_reference(name):
    reference = build(name, partial(t2tvit.T2TEmbed, fused_kernels="reference")).eval()
    fused = build(name).eval()
    assert fused.patch_embed.tokens_to_token.backend is None
    fused.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours, plain, exact = fused(x), reference(x), reference.double()(x.double())
    assert_as_accurate(ours, plain, exact)


def test_it_compiles_and_exports_whole():
    model = build("vit_tiny_patch16_224", depth=1).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, model(x))
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", VITS)
def test_as_many_tokens_as_patches(name):
    with torch.device("meta"):
        ours = timm.create_model(name, embed_layer=t2tvit.T2TEmbed)
        patches = timm.create_model(name)
    assert ours.patch_embed.num_patches == patches.patch_embed.num_patches == 196
    x = torch.zeros(2, 3, 224, 224, device="meta")
    assert ours.forward_features(x).shape == patches.forward_features(x).shape


def test_weights_of_a_t2t_vit_fit():
    source = t2tvit.create_model("t2t_vit_7", depth=1)
    embed = t2tvit.T2TEmbed(embed_dim=256)
    embed.tokens_to_token.load_state_dict(source.tokens_to_token.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(embed.eval()(x), source.eval().tokens_to_token(x))


@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
def test_images_of_any_size(size):
    model = build("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    x = torch.randn(2, 3, *size)
    grid = model.patch_embed.dynamic_feat_size(size)
    assert model(x).shape == (2, 3)
    maps = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert maps[0].shape == (2, 32, *grid)


def test_another_input_size():
    model = build("vit_tiny_patch16_224")
    model.set_input_size(img_size=(48, 64))
    assert model.patch_embed.grid_size == (3, 4)
    assert model(torch.zeros(1, 3, 48, 64)).shape == (1, 3)
    with pytest.raises(InputError, match=r"got images of \(32, 32\), the model was built for"):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "output_fmt, shape",
    [("NCHW", (2, 8, 2, 3)), ("NHWC", (2, 2, 3, 8)), ("NCL", (2, 8, 6)), ("NLC", (2, 6, 8))],
)
def test_formats_are_those_of_timm(output_fmt, shape):
    from timm.layers import PatchEmbed
    from timm.layers.format import Format

    x = torch.randn(2, 3, 32, 48)
    options = dict(img_size=(32, 48), embed_dim=8, output_fmt=Format(output_fmt))
    ours = t2tvit.T2TEmbed(**options).eval()
    assert ours(x).shape == PatchEmbed(**options)(x).shape == shape
    plain = t2tvit.T2TEmbed(img_size=(32, 48), embed_dim=8).eval()
    plain.load_state_dict(ours.state_dict())
    tokens = {"NCHW": "bchw->bhwc", "NHWC": "bhwc->bhwc", "NCL": "bcl->blc", "NLC": "blc->blc"}
    assert torch.equal(torch.einsum(tokens[output_fmt], ours(x)).reshape(2, 6, 8), plain(x))


def test_norm_bias_and_dtype():
    options = dict(img_size=32, embed_dim=8, bias=False, norm_layer=nn.LayerNorm)
    embed = t2tvit.T2TEmbed(**options, dtype=torch.float64)
    assert embed.tokens_to_token.project.bias is None
    tokens = embed(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert tokens.dtype == torch.float64
    torch.testing.assert_close(tokens.mean(2), torch.zeros(1, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patch_size=32), "patch_size: got 32, T2T tokens are 16 pixels apart"),
        (dict(output_fmt="NHC"), "output_fmt: unknown format 'NHC'"),
        (dict(img_size=8), "img_size: got 8, expected at least 16"),
        (dict(fused_kernels="cudaa"), "fused_kernels: unknown backend 'cudaa'"),
    ],
)
def test_unsupported_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        t2tvit.T2TEmbed(**options)


@pytest.mark.parametrize(
    "name, options",
    [
        ("deit3_small_patch16_224", {}),
        ("vit_base_patch32_224", dict(patch_size=16)),
        ("vit_small_patch14_dinov2", dict(patch_size=16)),
        ("vit_base_patch16_siglip_224", {}),
        ("samvit_base_patch16_224", dict(embed_layer=partial(t2tvit.T2TEmbed, output_fmt="NHWC"))),
    ],
)
def test_families_that_support_it(name, options):
    with torch.device("meta"):
        model = timm.create_model(name, **{"embed_layer": t2tvit.T2TEmbed, "depth": 1, **options})
        size = timm.get_pretrained_cfg(name).input_size[1:]
        assert model(torch.zeros(2, 3, *size)).shape[0] == 2
    assert isinstance(model.patch_embed, t2tvit.T2TEmbed)


@pytest.mark.parametrize(
    "name, options",
    [
        ("beit_base_patch16_224", {}),
        ("cait_xxs24_224", {}),
        ("vit_base_patch16_rope_224", {}),
        ("vit_small_patch16_dinov3", dict(output_fmt="NHWC", strict_img_size=False)),
    ],
)
def test_families_whose_embedding_is_replaced(name, options):
    with torch.device("meta"):
        model = timm.create_model(name)
        size = timm.get_pretrained_cfg(name).input_size[1:]
        tokens = model.forward_features(torch.zeros(2, 3, *size)).shape
        model.patch_embed = t2tvit.T2TEmbed(size, embed_dim=model.embed_dim, **options)
        assert model.forward_features(torch.zeros(2, 3, *size)).shape == tokens
