"""Pictures of models: recorded values, descriptions, and content of the pictures."""

import json
import math
import re
import warnings
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

from PIL import Image  # noqa: E402

import t2tvit  # noqa: E402
from t2t_kernels import performer_attention  # noqa: E402
from t2tvit.cli import main  # noqa: E402
from t2tvit.figures import literal_text  # noqa: E402
from t2tvit.terminal import printable  # noqa: E402
from t2tvit.training.checkpointing import Weights, save_weights  # noqa: E402
from t2tvit.visualization import draw  # noqa: E402
from t2tvit.visualization.page import Page  # noqa: E402
from t2tvit.visualization.pages import choose, visualize  # noqa: E402
from t2tvit.visualization.performer import (  # noqa: E402
    compare,
    feature_attention,
    orthogonal_features,
    softmax_attention,
    study,
)
from t2tvit.visualization.record import (  # noqa: E402
    Layer,
    as_maps,
    grid_of,
    probabilities,
    record,
)
from tests.support.commands import ARGS, CLASS_NAMES, CONFIG, model, run, weights  # noqa: E402
from tests.support.figure_layout import HOSTILE, check_layout  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


# Feature maps


def test_dead_and_exploding_channels():
    maps = torch.randn(2, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[:, 2] = 0
    maps[0, 3] = 0  # dead in one image only
    maps[1, 5, 0, 0] = 100
    maps[1, 6, 2, 2] = math.nan
    layer = Layer("planted", maps)
    assert (layer.dead, layer.exploding) == ([2], [5, 6])
    assert Layer("all dead", torch.zeros(1, 3, 2, 2)).dead == [0, 1, 2]
    assert Layer("most dead", torch.tensor([0.0, 0, 0, 5]).reshape(1, 4, 1, 1)).exploding == []


@pytest.mark.parametrize(
    "tokens, size, found",
    [
        (197, (224, 224), (1, (14, 14))),
        (3136, (224, 224), (0, (56, 56))),
        (198, (224, 224), (2, (14, 14))),
        (201, (224, 224), (5, (14, 14))),
        (7, (32, 48), (1, (2, 3))),
        (96, (32, 48), (0, (8, 12))),
        (199, (224, 224), (3, (14, 14))),
        (2, (32, 320), None),
    ],
)
def test_grids(tokens, size, found):
    assert grid_of(tokens, size) == found


def test_maps_of_any_layout():
    x = torch.randn(2, 5, 4, 6)
    assert torch.equal(as_maps(x, (32, 48)), x)
    assert torch.equal(as_maps(x.permute(0, 2, 3, 1), (32, 48)), x)
    tokens = torch.cat([torch.zeros(2, 1, 5), x.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(as_maps(tokens, (32, 48)), x)
    assert as_maps(torch.zeros(2, 10), (32, 48)) is None


def test_the_layers_of_a_t2t_vit():
    made = model()
    recorded = record(made, IMAGES)
    stem = [f"tokens_to_token.{part}" for part in ("attention1", "attention2", "project")]
    assert [layer.name for layer in recorded.layers] == [*stem, "blocks.0", "blocks.1", "norm"]
    shapes = [tuple(layer.maps.shape) for layer in recorded.layers]
    assert shapes == [(2, 64, 8, 12), (2, 64, 4, 6), *4 * [(2, 32, 2, 3)]]
    with torch.no_grad():
        last = made.forward_features(IMAGES)[:, 1:].transpose(1, 2).unflatten(2, (2, 3))
        assert torch.equal(recorded.logits, made(IMAGES))
    assert torch.equal(recorded.layers[-1].maps, last)
    assert not made.norm._forward_hooks and not made.blocks[0].attn._forward_hooks


def test_marked_channels_are_shown():
    assert choose(6, 64, [1], [2]) == list(range(6))
    shown = choose(400, 16, [7, 301], [399])
    assert len(shown) == 16 and {7, 301, 399} <= set(shown)
    maps = torch.randn(3, 4, 4)
    picture = np.asarray(draw.feature_grid(maps, [0, 1, 2], dead=[1], exploding=[2]))
    corners = [tuple(int(value) for value in picture[0, column * 62]) for column in range(3)]
    assert corners == [draw.PLAIN_COLOR, draw.DEAD_COLOR, draw.EXPLODING_COLOR]


# Attention


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_14_se", "t2t_vit_16_ghost"])
def test_attention_of_each_head(name):
    torch.manual_seed(0)
    options = dict(img_size=(32, 48), depth=2, embed_dim=32, num_heads=2)
    made = t2tvit.create_model(name, **options).eval()
    for block in made.blocks:
        nn.init.normal_(block.attn.proj.bias)
    attended = record(made, IMAGES).attended
    assert attended.names == ["blocks.0.attn", "blocks.1.attn"] and not attended.unknown
    # By hand: the first block's class token.
    with torch.no_grad():
        tokens = made.tokens_to_token(IMAGES)
        x = torch.cat([made.cls_token.expand(2, -1, -1), tokens], 1) + made.pos_embed
        q, k, _ = made.blocks[0].attn.inputs(made.blocks[0].norm1(x))
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        shares = (q[:, :1, part] @ k[..., part].mT * 16**-0.5).softmax(-1)[:, 0, 1:]
        torch.testing.assert_close(attended.heads[0][:, head], shares.unflatten(1, (2, 3)))
    # Half of the skip stays with the class token in each of two layers.
    assert (attended.rollout.sum((1, 2)) < 0.75).all() and (attended.rollout > 0).all()


def test_attention_of_another_kind_is_not_guessed():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1, qk_norm=True)
    assert record(vit.eval(), IMAGES).attended.names == ["blocks.0.attn"]
    relative = timm.create_model("vit_relpos_small_patch16_224", img_size=(32, 48), depth=1)
    for module in relative.modules():
        if hasattr(module, "relative_position_bias_table"):
            nn.init.normal_(module.relative_position_bias_table)
    attended = record(relative.eval(), IMAGES).attended
    assert (attended.names, attended.unknown) == ([], ["blocks.0.attn"])
    assert probabilities(nn.Linear(2, 2), IMAGES, IMAGES) is None


# Random features


def test_weights_are_those_of_the_performer():
    torch.manual_seed(0)
    k, q, v = torch.randn(3, 2, 20, 8, dtype=torch.float64)
    w = torch.randn(6, 8, dtype=torch.float64)
    ours = feature_attention(q, k, w) @ v
    torch.testing.assert_close(ours, performer_attention(k, q, v, w, backend="reference"))
    # Where the eps has turned it off.
    ours = feature_attention(9 * q, 9 * k, w) @ v
    exact = performer_attention(9 * k, 9 * q, v, w, backend="reference")
    torch.testing.assert_close(ours, exact)


def test_features_converge_to_the_softmax():
    torch.manual_seed(0)
    k, q, v = 0.3 * torch.randn(3, 1, 50, 16, dtype=torch.float64)
    exact, generator = softmax_attention(q, k), torch.Generator().manual_seed(0)
    found = [
        compare(feature_attention(q, k, orthogonal_features(m, 16, generator)), exact, v)
        for m in (16, 4096)
    ]
    assert found[1].distance < 0.25 * found[0].distance < 0.25
    assert found[1].output_error < found[0].output_error
    nothing = compare(torch.zeros_like(exact), exact, v)
    assert (nothing.distance, nothing.mass) == (pytest.approx(1), 0)
    w = orthogonal_features(16, 16, generator)
    torch.testing.assert_close(w @ w.T, 16 * torch.eye(16, dtype=torch.float64))


def test_study_of_both_layers():
    made = t2tvit.create_model("t2t_vit_7", img_size=(32, 48), depth=1).eval()
    layer = made.tokens_to_token.attention1
    found = study(layer, IMAGES, (8, 12))
    assert found.positions == [(2, 3), (2, 8), (5, 3), (5, 8)]
    assert found.maps.shape == found.softmax.shape == (2, 4, 8, 12)
    torch.testing.assert_close(found.softmax.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))
    assert set(found.approximations) >= {"own", "uniform", 32, 1024}
    softmax = t2tvit.create_model("t2t_vit_t_14", img_size=(32, 48), depth=1).eval()
    assert study(softmax.tokens_to_token.attention1, IMAGES, (8, 12)).approximations == {}


# The command


def check_page(folder) -> str:
    """Every picture of the page is there, and none is blank."""
    page = (folder / "index.html").read_text()
    names = re.findall(r'src="([^"]+)"', page)
    assert names and {path.name for path in folder.glob("*.png")} == set(names)
    for name in names:
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 5, f"{name} is blank"
    return page


def test_the_photographs_through_trained_weights(tmp_path, capsys):
    folder = tmp_path / "out"
    out = run(capsys, "visualize", "--checkpoint", weights(tmp_path), "--output", folder)
    assert out.startswith(f"{folder / 'index.html'}: t2t_vit_7, ") and "6 layers" in out
    page = check_page(folder)
    for text in ("china.jpg: ", "flower.jpg: ", "daisy", "Soft splits", "rollout", "attention1"):
        assert text in page
    facts = json.loads((folder / "layers.json").read_text())
    assert [layer["channels"] for layer in facts["layers"]] == [64, 64, 32, 32, 32, 32]
    assert [layer["features"] for layer in facts["performer"]] == [32, 32]


def test_planted_channels_are_counted_and_framed(tmp_path, capsys):
    """In a network of timm: a channel without weight, and one far too large."""
    torch.manual_seed(0)
    made = timm.create_model("resnet18", num_classes=4).eval()
    with torch.no_grad():
        made.bn1.weight[3] = made.bn1.bias[3] = 0
        made.bn1.weight[9] *= 1000
    torch.save(made.state_dict(), tmp_path / "w.pth")
    folder = tmp_path / "out"
    options = ("--model", "timm:resnet18", "--num-classes", "4", "--img-size", "64")
    run(capsys, "visualize", *options, "--checkpoint", tmp_path / "w.pth", "--output", folder)
    page = check_page(folder)
    layers = json.loads((folder / "layers.json").read_text())["layers"]
    first = {layer["layer"]: layer for layer in layers}["bn1"]
    assert (first["dead"], first["exploding"], first["map"]) == ([3], [9], [32, 32])
    assert "bn1, china.jpg: 64 of 64 channels, 1 dead (3), 1 exploding (9)" in page
    picture = np.asarray(Image.open(folder / "layer01-image0.png"))
    colors = [tuple(int(value) for value in picture[0, 62 * channel]) for channel in (2, 3, 9)]
    assert colors == [draw.PLAIN_COLOR, draw.DEAD_COLOR, draw.EXPLODING_COLOR]


def test_a_model_with_non_finite_outputs_is_shown(tmp_path):
    made = model()
    with torch.no_grad():
        made.tokens_to_token.attention2.kqv.weight[3, 4] = math.nan
    pictures = [(name, Image.new("RGB", (48, 32), "red")) for name in ("a", "b")]
    visualize(made, IMAGES, pictures, Page(tmp_path, "Broken"))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    facts = json.loads((tmp_path / "layers.json").read_text(), parse_constant=refuse)
    counts = [len(layer["exploding"]) for layer in facts["layers"]]
    assert counts == [0, 64, 32, 32, 32, 32]
    assert "not finite" in (tmp_path / "index.html").read_text()


def test_a_vit_on_t2t_tokens(tmp_path):
    """The function, on a model that no command builds."""
    options = dict(embed_layer=t2tvit.T2TEmbed, img_size=(32, 48), depth=1)
    made = timm.create_model("vit_tiny_patch16_224", **options).eval()
    pictures = [(name, Image.new("RGB", (48, 32), "red")) for name in ("a", "b")]
    pictures[0][1].putpixel((3, 3), (0, 255, 255))
    pictures[1][1].paste("blue", (9, 9, 30, 30))
    visualize(made, IMAGES, pictures, Page(tmp_path, "A <title>"), channels=4)
    page = (tmp_path / "index.html").read_text()
    assert "A &lt;title&gt;" in page and "patch_embed.tokens_to_token.attention1" in page
    assert (tmp_path / "tokens-image0.png").is_file() and (tmp_path / "t2t0-image1.png").is_file()


def test_the_images_of_a_run_and_of_folders(tmp_path, capsys):
    random = np.random.default_rng(0)
    for split, name in product(("train", "val"), CLASS_NAMES):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for number in range(7):
            pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{name}{number}.png")
    config = CONFIG | {"data": f"imagefolder:{tmp_path}/data", "mean": None, "std": None}
    about = Weights("t2t_vit_7", ARGS, CLASS_NAMES, config)
    save_weights(model(), tmp_path / "best.safetensors", about)
    source = ("visualize", "--run", tmp_path, "--output", tmp_path / "out")
    run(capsys, *source)
    page = check_page(tmp_path / "out")
    captions = re.findall(r"<figcaption>(\w+)\d.png, is (\w+): predicted \w+ [\d.]+%, ", page)
    assert len(captions) == 4 and all(file == name for file, name in captions)
    assert "china.jpg" not in page
    # The same images have the same predictions as those of t2tvit predict.
    records = run(capsys, "predict", "--run", tmp_path, "--images", "4", "--json").splitlines()
    for each in map(json.loads, records):
        best = each["predictions"][0]
        start = f"{Path(each['file']).name}, is {each['label']}: predicted {best['class']} "
        assert f"{start}{best['probability']:.1%}" in page
    # A folder, as predict takes it, up to a page's number of images; files left out are an aside.
    (tmp_path / "data" / "val" / "notes.\x1b[31m").touch()
    capsys.readouterr()
    assert main([str(word) for word in (*source, tmp_path / "data" / "val")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("showing the first 16 of 21 images\n") and "skipped" not in out
    assert err == "1 file skipped: .\\x1b[31m (1)\n"
    page = check_page(tmp_path / "out")
    assert "daisy0.png: predicted" in page and "violet1.png: predicted" in page


def test_hostile_names_on_the_page(tmp_path, capsys):
    names = [name.replace("/", "")[:100] for name in HOSTILE if name.strip()][:12]
    (tmp_path / "$x$ \udcff\n").mkdir()
    for name in names:
        Image.effect_noise((60, 40), 90).save(tmp_path / "$x$ \udcff\n" / f"{name}.png")
    (tmp_path / "$y$\n").mkdir()
    source = weights(tmp_path / "$y$\n", ["$x^2$", "<b>", "caf\udce9"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = ("--checkpoint", source, tmp_path / "$x$ \udcff\n")
        out = run(capsys, "visualize", *arguments, "--output", tmp_path / "out")
    assert len(out.splitlines()) == 1
    page = check_page(tmp_path / "out")
    for name in names:
        assert escape(f"{printable(name)}.png: predicted") in page
    assert "&lt;b&gt;" in page and "caf\\udce9" in page and "<b>" not in page


def test_headings_are_next_to_the_cells():
    cells = 4 * [np.full((4, 8, 3), 99, dtype=np.uint8)]
    plain = draw.mosaic(cells, 2, 40)
    assert plain.size == (2 * 46, 2 * 26)
    named = draw.mosaic(cells, 2, 40, heads=("head 0", "a long heading"), rows=("one", "two"))
    pixels = np.asarray(named, dtype=int)
    dark = (pixels.sum(2) < 250) & (pixels != 99).any(2)
    columns = np.flatnonzero(dark[: draw.LINE].any(0))
    assert columns.max() > named.width / 2 > columns.min() and columns.max() < named.width
    rows = np.flatnonzero(dark[draw.LINE :, :20].any(1))
    assert rows.size and rows.max() - rows.min() > 20
    # The cells are whole and as many as before.
    grey = (pixels == 99).all(2)
    assert grey.sum() == 4 * 40 * 20


def test_the_page_lists_the_channels_it_shows(tmp_path):
    pictures = [(name, Image.new("RGB", (48, 32), "red")) for name in ("a", "b")]
    visualize(model(), IMAGES, pictures, Page(tmp_path, "Title"), channels=10)
    page = (tmp_path / "index.html").read_text()
    assert "attention1, a: 10 of 64 channels (0, 6, 12, 19, 25, 32, 38, 44, …)" in page
    assert 'name="viewport"' in page


@pytest.mark.parametrize("title", ["tokens_to_token.attention1", "$x$"])
def test_the_plot_of_random_features(title):
    errors = {32: 0.9, 64: 0.5, 1024: 0.1}
    with literal_text():
        figure = draw.approximation(errors, (40, 0.7), 0.95, title)
        check_layout(figure)


def test_user_errors(tmp_path, capsys):
    options = ("--output", tmp_path / "out")
    for arguments, message in (
        ((), "give --run, --checkpoint or --model"),
        (("--model", "timm:resnt18"), "did you mean 'resnet18'?"),
        (("--model", "t2t_vit_7", "--pretrained"), "only timm models have such weights"),
        (("--model", "t2t_vit7"), "did you mean 't2t_vit_7'?"),
        (("--model", "timm:resnet18", "--checkpoint", tmp_path / "gone.pth"), "gone.pth"),
        (("--model", "t2t_vit_7", tmp_path / "gone.jpg"), "gone.jpg does not exist"),
        (("--model", "t2t_vit_7", "--channels", "0"), "--channels: got 0"),
    ):
        assert message in run(capsys, "visualize", *arguments, *options, status=2)
    assert not (tmp_path / "out").exists()
