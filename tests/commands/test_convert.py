"""Conversion of weights, also to and from the Hub, which a folder replaces here."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import t2tvit
from t2tvit import hub
from t2tvit.errors import InputError

timm = pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

from t2tvit.training.checkpointing import read_about  # noqa: E402
from tests.support.commands import CLASS_NAMES, model, run, weights  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def logits(made) -> torch.Tensor:
    with torch.no_grad():
        return made.eval()(IMAGES)


def loaded(path: Path) -> torch.Tensor:
    made = model()
    torch.nn.init.zeros_(made.head.weight)
    t2tvit.load_checkpoint(made, path)
    return logits(made)


def test_conversion_there_and_back(tmp_path, capsys):
    """File → published format → folder in timm's format → file: the same model, classes, images."""
    source = weights(tmp_path)
    published, back = tmp_path / "w.pth.tar", tmp_path / "back.safetensors"
    folder = f"local-dir:{tmp_path}/hub"
    line = run(capsys, "convert", source, folder)
    assert line == f"{source} → {folder}: t2t_vit_7, 3 classes, 32×48\n"
    run(capsys, "convert", folder, published)
    content = torch.load(published, weights_only=True)
    assert set(content) == {"arch", "state_dict", "state_dict_ema"}
    assert torch.equal(loaded(published), logits(model()))
    run(capsys, "convert", folder, back)
    assert torch.equal(loaded(back), logits(model()))
    before, after = read_about(source), read_about(back)
    assert after.class_names == before.class_names == CLASS_NAMES
    for key in ("img_size", "mean", "std", "crop_pct", "interpolation"):
        assert after.config[key] == before.config[key], key


@pytest.mark.parametrize("tokens_type", ["performer", "convolution", "patch"])
def test_grey_images_are_recognised_from_the_weights(tokens_type, tmp_path, capsys):
    options = dict(img_size=32, in_chans=1, depth=1, tokens_type=tokens_type)
    made = t2tvit.create_model("t2t_vit_7", **options)
    torch.save(made.state_dict(), tmp_path / "w.pth")
    arguments = ("--model", "t2t_vit_7", "--model-args", "depth=1", f"tokens_type={tokens_type}")
    run(capsys, "convert", tmp_path / "w.pth", tmp_path / "w.safetensors", *arguments)
    assert read_about(tmp_path / "w.safetensors").create_args["in_chans"] == 1


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_get_a_description(prefix, tmp_path, capsys):
    options = dict(img_size=64, num_classes=1000, depth=1)
    made = t2tvit.create_model("t2t_vit_7", **options).eval()
    state = {prefix + key: value for key, value in made.state_dict().items()}
    torch.save({"state_dict_ema": state}, tmp_path / "w.pth.tar")
    target = tmp_path / "w.safetensors"
    arguments = (tmp_path / "w.pth.tar", target, "--model", "t2t_vit_7", "--model-args", "depth=1")
    assert run(capsys, "convert", *arguments).endswith("t2t_vit_7, 1000 classes, 64×64\n")
    about = read_about(target)
    assert about.class_names[0] == "n01440764" and len(about.class_names) == 1000
    assert (about.config["img_size"], about.config["mean"]) == ([64, 64], [0.485, 0.456, 0.406])
    images = torch.randn(1, 3, 64, 64)
    again = t2tvit.create_model("t2t_vit_7", **options).eval()
    t2tvit.load_checkpoint(again, target)
    assert torch.equal(again(images), made(images))


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Folders instead of the Hub's repositories."""
    import huggingface_hub

    root = tmp_path / "network"

    def create_repo(self, repo_id, exist_ok):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path, revision):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, revision, allow_patterns):
        assert set(allow_patterns) == {path.name for path in (root / repo_id).iterdir()}
        return str(root / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_the_hub(network, tmp_path, capsys):
    source, back = weights(tmp_path), tmp_path / "back.safetensors"
    run(capsys, "convert", source, "hf-hub:somebody/flowers")
    run(capsys, "convert", "hf-hub:somebody/flowers", back)
    assert torch.equal(loaded(back), logits(model()))
    made = hub.load("hf-hub:somebody/flowers@main")
    assert torch.equal(logits(made), logits(model()))


def test_timm_builds_what_was_pushed(tmp_path):
    source = model()
    source.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    address = f"local-dir:{tmp_path}"
    hub.push(source, address, class_names=CLASS_NAMES)
    made = timm.create_model(address, pretrained=True)
    assert torch.equal(logits(made), logits(source))
    assert timm.data.resolve_data_config({}, model=made)["mean"] == [0.1, 0.2, 0.3]
    assert made.pretrained_cfg["label_names"] == CLASS_NAMES
    fresh = timm.create_model(address)
    assert fresh.num_classes == 3 and not torch.equal(fresh.head.weight, source.head.weight)


def test_transfer_from_what_was_pushed(tmp_path):
    """Another head and another size, from a grid that is not square."""
    source, address = model(), f"local-dir:{tmp_path}"
    hub.push(source, address, class_names=CLASS_NAMES)
    made = timm.create_model(address, pretrained=True, num_classes=5, img_size=64)
    assert made(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert "label_names" not in made.pretrained_cfg
    assert made.pretrained_cfg["input_size"] == (3, 64, 64)
    assert torch.equal(made.norm.weight, source.norm.weight)


def test_models_that_cannot_be_pushed(tmp_path):
    from t2tvit.models.variants import SEAttention

    with pytest.raises(InputError, match="class_names: got 2, expected 3"):
        hub.push(model(), f"local-dir:{tmp_path}/a", class_names=["a", "b"])
    with pytest.raises(InputError, match="cannot be written as JSON"):
        hub.push(model(attention_layer=SEAttention), f"local-dir:{tmp_path}/a")
    with pytest.raises(InputError, match="expected hf-hub:USER/NAME or local-dir:FOLDER"):
        hub.push(model(), str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_bad_input_to_convert(tmp_path, capsys):
    source, bare = weights(tmp_path), tmp_path / "bare.pth"
    torch.save(model().state_dict(), bare)
    (tmp_path / "names.txt").write_text("a\nb\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"architecture": "t2t_vit_7"}))
    target = tmp_path / "t.safetensors"
    for arguments, message in (
        ((source, tmp_path / "t.bin"), "TARGET: got"),
        ((bare, target), "does not name its model; give --model"),
        ((source, target, "--model", "t2t_vit_7"), "itself says what it is; remove the option"),
        ((tmp_path / "gone.pth", target), "does not exist"),
        ((f"local-dir:{tmp_path}/gone", target), "there is no such folder"),
        ((f"local-dir:{tmp_path}", target), "there is no config.json"),
        ((f"local-dir:{broken}", target), "config.json does not have timm's format"),
        (("hf-hub:", target), "expected hf-hub:USER/NAME"),
        ((source, target, "--class-names", tmp_path / "names.txt"), "has 2 lines, the model 3"),
    ):
        assert message in run(capsys, "convert", *arguments, status=2)
        assert not target.exists()


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path, capsys):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = run(capsys, "convert", "hf-hub:somebody/flowers", tmp_path / "t.pth", status=1)
    assert "hf-hub:somebody/flowers: ConnectionError: no route to host" in line


def test_heads_of_published_weights(tmp_path, capsys):
    """Weights without a head stay without; another number of classes is a one-line error."""
    target = tmp_path / "t.safetensors"
    options = ("--model", "t2t_vit_7", "--model-args", "depth=1")
    for classes in (0, 4):
        made = t2tvit.create_model("t2t_vit_7", depth=1, img_size=32, num_classes=classes)
        torch.save(made.state_dict(), tmp_path / "w.pth")
        run(capsys, "convert", tmp_path / "w.pth", target, *options)
        assert read_about(target).create_args["num_classes"] == classes
        line = run(
            capsys, "convert", tmp_path / "w.pth", target, *options, "--num-classes", "5", status=2
        )
        assert ("has no head" if classes == 0 else "has 4 classes, the model 5") in line


def test_warnings_are_printed_once(tmp_path, capsys, caplog):
    state = model().state_dict()
    torch.save({"model": state, "model_ema": state}, tmp_path / "w.pth")
    options = ("embed_dim=32", "depth=2", "num_heads=2")
    target = tmp_path / "t.safetensors"
    size = ("--img-size", "32", "48")
    source = ("--model", "t2t_vit_7", "--model-args", *options)
    run(capsys, "convert", tmp_path / "w.pth", target, *source, *size)
    assert len(caplog.records) == 1
