"""A file may only describe models of its own size, with arguments that shape the network."""

import json

import pytest
import torch
from safetensors.torch import load_file

import t2tvit
from t2tvit import hub
from t2tvit.errors import InputError
from t2tvit.models.described import check_described
from t2tvit.models.timm_models import create_timm_model

SPACE = 10**8


@pytest.mark.parametrize(
    "name, args",
    [
        ("t2t_vit_7", dict(img_size=[32, 48], depth=2, num_classes=3, qk_scale=None)),
        ("t2t_vit_dense", dict(stages=[1, 2], growth_rate=64)),
        ("timm:vit_tiny_patch16_224", dict(img_size=32, depth=1, global_pool="avg")),
        ("timm:resnet18", dict(num_classes=3, in_chans=1)),
    ],
)
def test_allowed_descriptions(name, args):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    check_described(name, args, SPACE, "file")


@pytest.mark.parametrize(
    "args",
    [
        dict(pretrained=True),
        dict(pretrained_cfg={"url": "http://localhost/a.pth"}),
        dict(pretrained_cfg_overlay={"file": "/tmp/a.pth"}),
        dict(checkpoint_path="/tmp/a.pth"),
        dict(cache_dir="/tmp"),
        dict(features_only=True),
        dict(scriptable=True),
        dict(img_size="/etc/passwd"),
        dict(norm_layer={"a": 1}),
    ],
)
def test_arguments_that_reach_beyond_the_network(args, monkeypatch):
    timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was called"))
    with pytest.raises(InputError, match=f"file: .*{next(iter(args))}"):
        check_described("timm:resnet18", args, SPACE, "file")


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("t2t_vit_7", dict(num_classes=10**9), "the argument 'num_classes' of t2t_vit_7 is 10000"),
        (
            "t2t_vit_7",
            dict(num_classes=10**6),
            r"of 2\d\d,\d\d\d,\d\d\d numbers.*100,000,000 bytes",
        ),
        ("t2t_vit_7", dict(depth=10**5), "the argument 'depth' of t2t_vit_7 is 100000"),
        ("t2t_vit_dense", dict(stages=[1, 10**5]), "the argument 'stages'"),
        ("t2t_vit_7", dict(img_size=[10**6, 10**6]), "numbers, but its file has"),
        ("t2t_vit_7", dict(img_size=10**30), "the argument 'img_size'"),
        ("t2t_vit_7", dict(embed_dim=-4), "embed_dim: got -4"),
        ("t2t_vit_7", dict(checkpoint_path="a"), "checkpoint_path"),
        ("t2t_vit_7", dict(attention_layer="Attention"), "no t2t_vit_7 can be built"),
        ("t2t_vit_7", dict(fused_kernels="cpu", depth=float("nan")), "depth"),
        ("timm:hf-hub:somebody/something", {}, "unknown model of timm"),
        ("nothing", {}, "the model 'nothing' is unknown"),
        (3, {}, "does not describe a model"),
        ("t2t_vit_7", [], "does not describe a model"),
    ],
)
def test_refused_descriptions(name, args, message):
    if str(name).startswith("timm:"):
        pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    with pytest.raises(InputError, match=message) as caught:
        check_described(name, args, SPACE, "file")
    assert len(str(caught.value)) < 400


def test_a_hostile_config_is_refused(tmp_path):
    model = t2tvit.create_model("t2t_vit_7", depth=1, img_size=32, num_classes=3)
    address = f"local-dir:{tmp_path}"
    hub.push(model, address)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change in (
        {"num_classes": 10**9},
        {"model_args": {"embed_dim": 10**6, "num_heads": 1}},
        {"model_args": {"img_size": [10**5, 10**5]}},
        {"architecture": "timm:resnet18", "model_args": {"pretrained": True}},
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match="config.json: "):
            hub.load(address)


@pytest.mark.parametrize(
    "change",
    [
        dict(label_names="abc"),
        dict(label_names=[1, 2, 3]),
        dict(label_names=["a", "b"]),
        dict(pretrained_cfg=dict(input_size=[3, 32, 32], mean=0.5)),
        dict(pretrained_cfg=dict(input_size=[3, 32, 32], std=["a", "b", "c"])),
        dict(pretrained_cfg=dict(input_size=3)),
        dict(pretrained_cfg=[]),
        dict(num_classes="many"),
        dict(model_args=3),
        dict(architecture=["t2t_vit_7"]),
        "[" * 100_000,
        " " * (2**26 + 1),
        "",
    ],
    ids=lambda change: str(change)[:40].strip() or "blank",
)
def test_a_config_in_another_format_is_refused(tmp_path, change):
    model = t2tvit.create_model("t2t_vit_7", depth=1, img_size=32, num_classes=3)
    hub.push(model, f"local-dir:{tmp_path}")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(config | change))
    with pytest.raises(InputError, match="config.json") as caught:
        hub.load(f"local-dir:{tmp_path}")
    assert len(str(caught.value)) < 500


def test_the_origin_of_weights_is_not_read_from_a_file(tmp_path):
    model = t2tvit.create_model("t2t_vit_7", depth=1, img_size=32, num_classes=3)
    hub.push(model, f"local-dir:{tmp_path}")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {
        "url": "http://localhost/a.pth",
        "file": "/tmp/a",
        "mean": [0, 0, 0],
    }
    path.write_text(json.dumps(config))
    cfg = hub.load(f"local-dir:{tmp_path}").pretrained_cfg
    assert cfg["mean"] == [0, 0, 0] and not {"url", "file"} & set(cfg)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(create_args=dict(pretrained_cfg={"url": "http://localhost/a"})), "pretrained_cfg"),
        (dict(create_args=dict(checkpoint_path="a.pth")), "checkpoint_path"),
        (dict(model="timm:resnet50", create_args=dict()), "numbers, but its file has"),
    ],
)
def test_metadata_of_a_file_of_weights(tmp_path, change, message):
    pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    from t2tvit.training.checkpointing import read_about
    from t2tvit.training.checkpointing.tensors import write_tensors
    from t2tvit.training.checkpointing.weights import METADATA_KEY

    about = dict(model="timm:resnet18", create_args={}, class_names=None, config={}) | change
    about["config"] = {"model": about["model"]}
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"weight": torch.ones(3)}, METADATA_KEY, about)
    assert load_file(path)["weight"].shape == (3,)
    with pytest.raises(InputError, match=message):
        read_about(path)
    about["config"] = {"model": "timm:resnet34"}
    write_tensors(path, {"weight": torch.ones(3)}, METADATA_KEY, about)
    with pytest.raises(InputError, match="it names two models"):
        read_about(path)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(pretrained=True), "'pretrained' does not shape the network"),
        (dict(pretrained_cfg=dict(file="a.pth")), "'pretrained_cfg' does not shape"),
        (dict(checkpoint_path="a.pth"), "'checkpoint_path' does not shape"),
        (dict(features_only=True), "'features_only' does not shape"),
        (dict(scriptable=True), "'scriptable' does not shape"),
        (dict(kwargs_filter=["a"]), "'kwargs_filter' does not shape"),
        (
            dict(layers=[10**8, 1, 1, 1]),
            r"layers: got \[100000000, 1, 1, 1\], expected at most 1,000",
        ),
        (dict(layers=[600, 600]), "expected at most 1,000"),
        (dict(num_classes=10**12), "num_classes: got 1000000000000, expected at most 1,000,000"),
    ],
)
def test_no_source_reaches_beyond_the_network(args, message, monkeypatch):
    timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    from t2tvit.models.timm_models import create_timm_model
    from t2tvit.training.model import build_model

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was called"))
    for build in (
        lambda: create_timm_model("timm:resnet18", **args),
        lambda: build_model("timm:resnet18", args, "auto"),
    ):
        with pytest.raises(InputError, match=message):
            build()


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("t2t_vit_7", dict(depth=10**8), "depth: got 100000000, expected at most 1,000"),
        (
            "t2t_vit_dense",
            dict(stages=[500, 501]),
            r"stages: got \[500, 501\], expected at most 1,000",
        ),
        ("t2t_vit_14", dict(num_classes=10**12), "num_classes: got 1000000000000"),
        ("vit_s_16", dict(embed_dim=999_936, num_heads=1), "its parameters need .* GiB of memory"),
    ],
)
def test_a_model_that_is_far_too_large_is_not_built(name, args, message):
    pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)
    from t2tvit.training.model import build_model

    with pytest.raises(InputError, match=message):
        build_model(name, args, "auto")


@pytest.mark.parametrize(
    "args",
    [
        {"norm_layer": "os.system"},
        {"act_layer": "no_such"},
        {"num_heads": 0},
        {"patch_size": -1},
        {"global_pool": "no_such"},
    ],
)
def test_values_that_timm_cannot_use_are_one_line(args):
    with pytest.raises(InputError, match="model timm:vit_tiny_patch16_224 with") as error:
        create_timm_model("timm:vit_tiny_patch16_224", **args)
    assert "\n" not in str(error.value)
