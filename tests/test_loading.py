"""A trained model in one call."""

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import t2tvit
from t2tvit import hub
from t2tvit.errors import InputError

pytest.importorskip("timm", reason="needs timm", exc_type=ImportError)

from PIL import Image

from t2tvit.cli import main
from tests.support.commands import CLASS_NAMES, CONFIG, model, weights

IMAGE = Image.effect_noise((60, 50), 90).convert("RGB")


def check(loaded, tmp_path) -> None:
    """The model is that of ``tiny``, and its transform is that of ``t2tvit predict``."""
    assert loaded.class_names == CLASS_NAMES
    assert not loaded.model.training
    images = loaded.transform(IMAGE)[None]
    assert images.shape == (1, 3, 32, 48) and images.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), model()(images))
    mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = images[0] * std + mean
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    IMAGE.save(tmp_path / "image.png")
    assert torch.equal(loaded.transform(tmp_path / "image.png")[None], images)


def test_every_source(tmp_path):
    path = weights(tmp_path)
    check(t2tvit.load(path), tmp_path)
    check(t2tvit.load(str(tmp_path)), tmp_path)
    source = model()
    source.pretrained_cfg |= {
        key: CONFIG[key] for key in ("mean", "std", "crop_pct", "interpolation")
    }
    hub.push(source, f"local-dir:{tmp_path}/hub", class_names=CLASS_NAMES)
    check(t2tvit.load(f"local-dir:{tmp_path}/hub", fused_kernels="reference"), tmp_path)


def test_last_weights_of_a_run(tmp_path):
    weights(tmp_path).rename(tmp_path / "last.safetensors")
    check(t2tvit.load(tmp_path, weights="last"), tmp_path)
    with pytest.raises(InputError, match="there is no best.safetensors"):
        t2tvit.load(tmp_path)


def test_published_weights(tmp_path):
    source = t2tvit.create_model("t2t_vit_7", depth=1, img_size=64).eval()
    torch.save({"state_dict_ema": source.state_dict()}, tmp_path / "w.pth.tar")
    loaded = t2tvit.load(tmp_path / "w.pth.tar", model="t2t_vit_7", model_args={"depth": 1})
    assert loaded.class_names[0] == "n01440764" and len(loaded.class_names) == 1000
    images = torch.stack([loaded.transform(IMAGE)])
    assert images.shape == (1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), source(images))


def test_a_timm_model(tmp_path):
    import timm

    from t2tvit.training.checkpointing import Weights, save_weights

    args = dict(img_size=[32, 32], num_classes=3, in_chans=1, drop_path_rate=0.0)
    made = timm.create_model("resnet10t", num_classes=3, in_chans=1).eval()
    config = CONFIG | {"model": "timm:resnet10t", "img_size": [32, 32], "mean": [0.5], "std": [0.2]}
    save_weights(made, tmp_path / "w.safetensors", Weights("timm:resnet10t", args, None, config))
    loaded = t2tvit.load(tmp_path / "w.safetensors")
    images = loaded.transform(IMAGE)[None]
    assert images.shape == (1, 1, 32, 32) and loaded.class_names is None
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), made(images))


def test_the_transform_works_in_the_processes_of_a_loader(tmp_path):
    transform = t2tvit.load(weights(tmp_path)).transform
    IMAGE.save(tmp_path / "image.png")
    files = [tmp_path / "image.png"] * 3
    loader = DataLoader(files, 3, num_workers=1, collate_fn=Collate(transform))
    assert next(iter(loader)).shape == (3, 3, 32, 48)


class Collate:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, files):
        return torch.stack([self.transform(file) for file in files])


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("gone.safetensors", {}, "does not exist"),
        ("bare.pth", {}, "does not name its model; give --model"),
        ("bare.pth", dict(model="t2t_vit_8"), "did you mean"),
        ("best.safetensors", dict(model="t2t_vit_7"), "itself says that it is t2t_vit_7"),
        ("best.safetensors", dict(model_args={}), "model_args: accepted only together with model"),
        ("best.safetensors", dict(device="cuda:77"), "device: got 'cuda:77'"),
        ("best.safetensors", dict(device="gpu"), "device: got 'gpu'"),
        ("best.safetensors", dict(weights="first"), "weights: unknown choice 'first'"),
        ("best.safetensors", dict(fused_kernels="fast"), "fused_kernels"),
        ("", dict(weights="last"), "there is no last.safetensors"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, source, options, message):
    weights(tmp_path)
    torch.save(model().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(InputError, match=message):
        t2tvit.load(tmp_path / source, **options)


def test_the_commands_accept_addresses(tmp_path, capsys):
    hub.push(model(), f"local-dir:{tmp_path}/hub", class_names=CLASS_NAMES)
    IMAGE.save(tmp_path / "image.png")
    path, address = str(tmp_path / "image.png"), f"local-dir:{tmp_path}/hub"
    assert main(["predict", path, "--checkpoint", address, "--workers", "0"]) == 0
    assert any(name in capsys.readouterr().out for name in CLASS_NAMES)


def test_importing_the_package_stays_light():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import t2tvit\n"
        "heavy = {'torchvision', 'matplotlib', 'PIL', 'sklearn', 'yaml', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
