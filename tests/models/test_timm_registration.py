"""The models in timm's registry, and the package without timm."""

import subprocess
import sys

import pytest
import torch

import t2tvit


def run(code: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_package_works_without_timm_and_torchvision():
    done = run(
        "import sys\n"
        "sys.modules['timm'] = sys.modules['torchvision'] = None\n"
        "import torch, t2tvit\n"
        "model = t2tvit.create_model('t2t_vit_7', depth=1, img_size=32).eval()\n"
        "assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_timm_that_cannot_be_imported_is_only_reported(tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('torchvision does not fit torch')\n")
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import t2tvit\n"
        "assert len(t2tvit.list_models()) == 14\n"
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: torchvision does not fit torch" in done.stderr


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", exc_type=ImportError)


def test_all_names_are_listed(timm):
    assert set(timm.list_models("t2t_vit*")) == set(t2tvit.list_models())
    assert timm.list_models("t2t_vit*", pretrained=True) == []


def test_create_model(timm):
    model = timm.create_model(
        "t2t_vit_14", pretrained=False, num_classes=10, img_size=(32, 48), in_chans=1, depth=1
    )
    assert type(model) is t2tvit.models.T2TVisionTransformer
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 10)
    assert model.pretrained_cfg["architecture"] == "t2t_vit_14"


def test_pretrained_weights_are_refused(timm):
    with pytest.raises(t2tvit.errors.InputError, match="load_checkpoint"):
        timm.create_model("t2t_vit_7", pretrained=True)


def test_checkpoint_path(timm, tmp_path):
    source = t2tvit.create_model("t2t_vit_7", depth=1, img_size=32)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    model = timm.create_model(
        "t2t_vit_7", depth=1, img_size=32, checkpoint_path=str(tmp_path / "a.pth")
    )
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize("size, crop_pct", [(224, 0.9), (384, 1.0)])
def test_data_config(timm, size, crop_pct):
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_7", img_size=size)
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, size, size)
    assert config["crop_pct"] == crop_pct
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_data_config_of_one_channel(timm):
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_7", in_chans=1)
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    assert len(config["mean"]) == len(config["std"]) == config["input_size"][0] == 1
    assert transform is not None


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_dense"])
def test_layer_decay(timm, name):
    """Deeper parameters have larger rates, from the T2T module and class token to the head."""
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(p): key for key, p in model.named_parameters()}
    scale, decay = {}, {}
    for group in groups:
        for p in group["params"]:
            scale[names[id(p)]] = group["lr_scale"]
            decay[names[id(p)]] = group["weight_decay"]
    assert set(scale) == {key for key, p in model.named_parameters() if p.requires_grad}
    depth = len(model.blocks)
    for key, value in scale.items():
        if key.startswith(("cls_token", "tokens_to_token")):
            expected = 0.5 ** (depth + 1)
        elif key.startswith("blocks."):
            expected = 0.5 ** (depth - int(key.split(".")[1]))
        else:
            expected = 0.5 if key.startswith("norm") else 1.0
        assert value == pytest.approx(expected), key
    assert decay["cls_token"] == decay["head.bias"] == decay["norm.weight"] == 0
    assert decay["head.weight"] == decay["tokens_to_token.project.weight"] == 0.05
