"""Behaviour of models: sizes, dtypes, dropout, checkpointing, compilation, the timm interface."""

import copy

import pytest
import torch
import torch.nn.functional as F

from t2tvit import create_model
from t2tvit.models import T2TModule, backbone, variants

SMALL = dict(depth=2, img_size=32, num_classes=10)
NAMES_SMALL = [
    ("t2t_vit_7", {}),
    ("t2t_vit_7", {"tokens_type": "transformer"}),
    ("t2t_vit_7", {"tokens_type": "convolution"}),
    ("t2t_vit_14_se", {}),
    ("t2t_vit_16_ghost", {}),
    ("t2t_vit_dense", {}),
]


def small_model(name="t2t_vit_7", **options):
    torch.manual_seed(0)
    shape = {**SMALL, **options}
    if name == "t2t_vit_dense":
        del shape["depth"]
        shape["stages"] = (1, 1)
    return create_model(name, **shape)


def gradients(model):
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


# The compiler comes first: what it cannot trace shows before anything else has warmed a cache.


@pytest.mark.slow
@pytest.mark.parametrize("name, options", NAMES_SMALL)
def test_whole_model_is_one_graph_in_training(name, options):
    model = small_model(name, drop_path_rate=0.2, drop_rate=0.1, attn_drop_rate=0.1, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 32, 32)).sum().backward()
    missing = [key for key, grad in gradients(model).items() if grad is None]
    assert not missing, f"no gradient for {missing}"


@pytest.mark.slow
def test_one_graph_has_eager_gradients():
    model = small_model(img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    expected.square().sum().backward()
    expected_gradients = copy.deepcopy(gradients(model))
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for key, grad in gradients(model).items():
        error = (grad - expected_gradients[key]).norm() / expected_gradients[key].norm()
        assert error < 1e-3, f"the compiled gradient of {key} is off by {error:.1e}"


def test_inductor_agrees_with_eager():
    model = small_model(depth=1, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_export_with_any_batch():
    model = small_model().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name, options", NAMES_SMALL)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(name, options, batch):
    model = small_model(name, **options)
    logits = model(torch.randn(batch, 3, 32, 32))
    assert logits.shape == (batch, 10)
    logits.sum().backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_rows_of_a_batch_are_independent():
    model = small_model().double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    rows = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), rows, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (18, 45), (23, 64), (100, 31)])
def test_any_size_at_construction_and_at_forward(size):
    built = small_model(img_size=size).eval()
    x = torch.randn(2, 3, *size)
    height, width = built.grid_size
    assert built.forward_features(x).shape == (2, 1 + height * width, 256)
    assert built.tokens_to_token(x).shape == (2, height * width, 256)
    assert built.pos_embed.shape == (1, 1 + height * width, 256)
    other = small_model(img_size=64).eval()
    assert other(x).shape == (2, 10)


def test_memory_format_does_not_matter():
    model = small_model().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    channels_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(channels_last), model(x), rtol=1e-10, atol=1e-12)


def test_layers_pass_on_their_tokens_without_a_copy():
    module = T2TModule(embed_dim=96)
    out, seen = [], []
    module.attention1.register_forward_hook(lambda _, args, y: out.append(y))
    module.attention2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(torch.randn(2, 3, 32, 32))
    assert seen[0].data_ptr() == out[0].data_ptr()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_convolution_tokens_are_three_convolutions():
    torch.manual_seed(0)
    module = T2TModule("convolution", in_chans=2, embed_dim=24, token_dim=8).double()
    x = torch.randn(2, 2, 37, 50, dtype=torch.float64)
    first, second = module.attention1, module.attention2
    y = F.conv2d(x, first.weight, first.bias, stride=4, padding=2)
    y = F.conv2d(y, second.weight, second.bias, stride=2, padding=1)
    weight = module.project.weight.view(24, 8, 3, 3)
    y = F.conv2d(y, weight, module.project.bias, stride=2, padding=1)
    torch.testing.assert_close(module(x), y.flatten(2).transpose(1, 2), rtol=1e-10, atol=1e-12)


def test_ghost_attention_is_made_with_depthwise_convolutions():
    torch.manual_seed(0)
    attention = variants.GhostAttention(24, 3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)

    def ghost(linear, cheap):
        y = linear(x)
        z = F.conv1d(y.transpose(1, 2), cheap.weight, groups=12).transpose(1, 2)
        return torch.cat([y, z], dim=2).view(2, 7, 3, 8).transpose(1, 2)

    q = ghost(attention.q, attention.cheap_operation_q)
    k = ghost(attention.k, attention.cheap_operation_k)
    v = ghost(attention.v, attention.cheap_operation_v)
    weights = (q @ k.transpose(2, 3) * 8**-0.5).softmax(dim=-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 7, 24))
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-12)


def test_ghost_mlp_is_made_with_depthwise_convolutions():
    torch.manual_seed(0)
    mlp = variants.GhostMlp(24, 72).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    x1 = F.gelu(mlp.fc1(x))
    x2, x3 = (
        F.gelu(F.conv1d(x1.transpose(1, 2), cheap.weight, groups=24).transpose(1, 2))
        for cheap in (mlp.cheap_operation2, mlp.cheap_operation3)
    )
    expected = mlp.fc2(torch.cat([x1, x2, x3], dim=2))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-10, atol=1e-12)


def test_performer_dropout_is_on_in_training_only():
    """Performer layers use dropout independent of the backbone's rates; transformer layers never do."""
    x = torch.randn(2, 3, 32, 32)
    performer, transformer = small_model(), small_model(tokens_type="transformer")
    assert not torch.equal(performer.tokens_to_token(x), performer.tokens_to_token(x))
    assert torch.equal(transformer(x), transformer(x))
    performer.eval()
    assert torch.equal(performer(x), performer(x))


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_backbone_dropouts_are_on_in_training_only(rate):
    x = torch.randn(4, 3, 32, 32)
    model = small_model(tokens_type="transformer", **{rate: 0.5})
    assert not torch.equal(model(x), model(x)), f"{rate} does nothing in training"
    model.eval()
    assert torch.equal(model(x), model(x)), f"{rate} is on in eval mode"


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = backbone.DropPath(0.25)(torch.ones(10_000, 3, 2))
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.75]))
    assert (y == y[:, :1, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name, options", NAMES_SMALL)
def test_grad_checkpointing_gives_equal_gradients(name, options):
    x = torch.randn(2, 3, 32, 32)
    found = []
    for enable in (False, True):
        model = small_model(name, drop_path_rate=0.3, drop_rate=0.2, **options)
        model.set_grad_checkpointing(enable)
        calls = []
        model.blocks[-1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(x).square().sum().backward()
        found.append(gradients(model))
        assert len(calls) == 1 + enable, "the last block was not recomputed in the backward"
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name, options", NAMES_SMALL)
def test_bfloat16_autocast(name, options):
    model = small_model(name, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    error = (rounded.float() - exact).norm() / exact.norm()
    assert error < 0.05, f"bfloat16 is off by {error:.1e}"
    rounded.float().sum().backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_supports_other_sizes(dtype):
    model = small_model().to(dtype).eval()
    logits = model(torch.randn(2, 3, 48, 40, dtype=dtype))
    assert logits.dtype == dtype and torch.isfinite(logits).all()


def test_backend_is_chosen_and_changed():
    model = small_model(fused_kernels="reference")
    assert model.fused_kernels == model.tokens_to_token.backend == "reference"
    model.set_fused_kernels("auto")
    assert model.fused_kernels == "auto" and model.tokens_to_token.backend is None


def test_head():
    model = small_model().eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features[:, 0])
    assert torch.equal(model(x), model.get_classifier()(pooled))

    model.double().reset_classifier(7)
    assert model.num_classes == 7 and model.get_classifier().weight.shape == (7, 256)
    assert model(x.double()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, model.num_features)
    assert isinstance(small_model(num_classes=0).get_classifier(), torch.nn.Identity)


def test_widths():
    assert (small_model().embed_dim, small_model().num_features) == (256, 256)
    with torch.device("meta"):
        dense = create_model("t2t_vit_dense")
    assert (dense.embed_dim, dense.num_features) == (128, 584)


def test_parameters_without_decay_are_in_the_model():
    names = {key for key, p in small_model().named_parameters() if p.requires_grad and p.ndim > 1}
    assert small_model().no_weight_decay() <= names
