"""Checkpoints: wrappers, prefixes, other sizes and heads, and whatever a file may hold wrongly."""

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from t2tvit import create_model, load_checkpoint
from t2tvit.errors import InputError
from t2tvit.models.positions import resize_positions


def small_model(seed=0, name="t2t_vit_7", **options):
    torch.manual_seed(seed)
    return create_model(name, **{"depth": 1, "img_size": 64, "num_classes": 10, **options})


def assert_same_weights(model, state, but=()):
    own = model.state_dict()
    for key, tensor in state.items():
        if not key.startswith(tuple(but)):
            assert torch.equal(own[key], tensor), f"{key} was not loaded"


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("wrapper", [None, "state_dict_ema", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.module."])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    source, model = small_model(1), small_model(2)
    state = source.state_dict()
    content = prefixed(state, prefix)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content if wrapper is None else {wrapper: content, "epoch": 3}, path)
    report = load_checkpoint(model, path)
    assert_same_weights(model, state)
    assert (report.wrapper, report.loaded) == (wrapper, len(state))
    assert report.resized is None and report.dropped_classes is None


def test_the_average_is_preferred_and_options_do_not_disturb(tmp_path):
    """A published file: epoch, options in a Namespace, optimiser, weights and their average."""
    average, last, model = small_model(1), small_model(2), small_model(3)
    path = tmp_path / "checkpoint.pth.tar"
    optimizer = torch.optim.AdamW(last.parameters())
    content = {
        "epoch": 310,
        "arch": "t2t_vit_7",
        "args": argparse.Namespace(lr=1e-3, sched="cosine", betas=(0.9, 0.999)),
        "optimizer": optimizer.state_dict(),
        "metric": 71.7,
        "state_dict": last.state_dict(),
        "state_dict_ema": average.state_dict(),
    }
    torch.save(content, path)
    assert load_checkpoint(model, path).wrapper == "state_dict_ema"
    assert_same_weights(model, average.state_dict())
    torch.save({**content, "state_dict_ema": None}, path)
    assert load_checkpoint(model, str(path)).wrapper == "state_dict"
    assert_same_weights(model, last.state_dict())


def test_safetensors(tmp_path):
    source, model = small_model(1), small_model(2)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    assert load_checkpoint(model, path).wrapper is None
    assert_same_weights(model, source.state_dict())


def test_a_model_of_another_dtype_keeps_it(tmp_path):
    source, model = small_model(1), small_model(2).double()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert model.pos_embed.dtype == model.head.weight.dtype == torch.float64
    assert_same_weights(model, source.double().state_dict())


def test_positions_of_another_size_are_resized(tmp_path, caplog):
    source, model = small_model(1), small_model(2, img_size=(96, 64))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, tmp_path / "a.pth")
    assert report.resized == ((4, 4), (6, 4))
    assert "(4, 4) to (6, 4)" in caplog.text
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, (4, 4), (6, 4)))
    assert not model.pos_embed.requires_grad
    assert_same_weights(model, source.state_dict(), but=["pos_embed"])


def test_positions_of_a_grid_that_is_not_square(tmp_path):
    source, model = small_model(1, img_size=(32, 96)), small_model(2)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"12 positions .* no square grid.*grid_size=\(h, w\)"):
        load_checkpoint(model, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"grid_size: got \(3, 5\), but .* has 12 positions"):
        load_checkpoint(model, tmp_path / "a.pth", grid_size=(3, 5))
    load_checkpoint(model, tmp_path / "a.pth", grid_size=(2, 6))
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, (2, 6), (4, 4)))


def test_positions_of_as_many_tokens_on_another_grid(tmp_path):
    source, model = small_model(1, img_size=64), small_model(2, img_size=(32, 128))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert load_checkpoint(model, tmp_path / "a.pth").resized is None
    report = load_checkpoint(model, tmp_path / "a.pth", grid_size=(4, 4))
    assert report.resized == ((4, 4), (2, 8))
    assert torch.equal(model.pos_embed, resize_positions(source.pos_embed, (4, 4), (2, 8)))
    with pytest.raises(InputError, match=r"grid_size: got 4, expected \(h, w\)"):
        load_checkpoint(model, tmp_path / "a.pth", grid_size=4)


@pytest.mark.parametrize("classes", [3, 0])
def test_head_of_another_number_of_classes_is_dropped(tmp_path, caplog, classes):
    source, model = small_model(1), small_model(2, num_classes=classes)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, tmp_path / "a.pth")
    assert report.dropped_classes == 10
    assert f"head of 10 classes is dropped; the model has a new one of {classes}" in caplog.text
    assert_same_weights(model, source.state_dict(), but=["head."])
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, classes or 256)
    assert all(torch.isfinite(p).all() for p in model.head.parameters()), "it is not a new head"


def change(state, **changes):
    state = dict(state)
    for key, tensor in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    return state


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm__bias": None}, r"missing: norm\.bias$"),
        ({"extra": torch.ones(1)}, r"unexpected: extra$"),
        ({"norm__bias": torch.ones(3)}, r"shape: norm\.bias \(got \(3,\), expected \(256,\)\)$"),
        (
            {"cls_token": None, "old": torch.ones(1), "norm__weight": torch.ones(2, 2)},
            r"missing: cls_token; unexpected: old; wrong shape: norm\.weight \(got \(2, 2\), ",
        ),
        ({"pos_embed": torch.ones(1, 26, 192)}, r"wrong shape: pos_embed \(got \(1, 26, 192\), "),
        ({"pos_embed": None}, r"missing: pos_embed$"),
        ({"head__weight": torch.ones(10, 7)}, r"wrong shape: head\.weight \(got \(10, 7\), "),
    ],
)
def test_a_mismatch_names_the_keys_and_leaves_the_model_alone(tmp_path, changes, message):
    model = small_model(2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.save(change(small_model(1).state_dict(), **changes), tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        load_checkpoint(model, tmp_path / "a.pth")
    assert_same_weights(model, before)


def test_another_architecture_is_a_mismatch(tmp_path):
    torch.save(small_model(1).state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"missing: .*attn\.qkv.*; unexpected: .*kqv"):
        load_checkpoint(small_model(2, tokens_type="transformer"), tmp_path / "a.pth")


class Code:
    """Unpickling one of these would write the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path, proof = tmp_path / "a.pth", tmp_path / "it-ran"
    content = {"state_dict": small_model().state_dict(), "args": Code(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"could run code, so it is not read.*save its weights"):
        load_checkpoint(small_model(), path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file was harmless, so this test shows nothing"


def truncated(path, content):
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_safetensors(path, content):
    save_file(content, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def module(path, content):
    torch.save(torch.nn.Linear(2, 2), path)


UNREADABLE = [
    ("a.pth", lambda path, state: None, "there is no file"),
    ("a.pth", lambda path, state: path.mkdir(), "not a file"),
    ("a.pth", lambda path, state: path.write_bytes(b""), "truncated or of another format"),
    ("a.pth", lambda path, state: path.write_text("hello"), "truncated or of another format"),
    ("a.pth", truncated, "truncated or of another format"),
    ("a.pth", lambda path, state: save_file(state, path), "truncated or of another format"),
    ("a.safetensors", truncated_safetensors, "truncated or of another format"),
    ("a.safetensors", lambda path, state: torch.save(state, path), "truncated or of another"),
    ("a.pth", module, r"holds torch\.nn\.modules\.linear\.Linear"),
    ("a.pth", lambda path, state: torch.save([1], path), "got a list in .* expected a state dict"),
    ("a.pth", lambda path, state: torch.save({}, path), "holds nothing"),
    ("a.pth", lambda path, state: torch.save({"model": {}}, path), "in its model nothing"),
    ("a.pth", lambda path, state: torch.save({"epoch": 1}, path), "no tensors: epoch"),
    ("a.pth", lambda path, state: torch.save({1: torch.ones(1)}, path), "no tensors: 1"),
    (
        "a.pth",
        lambda path, state: torch.save({**state, **prefixed(state, "module.")}, path),
        "coincide without their prefixes",
    ),
    (
        "a.pth",
        lambda path, state: torch.save({"model": state, "best": np.float64(1)}, path),
        r"holds numpy\.\w+\.multiarray\.scalar",
    ),
]


@pytest.mark.parametrize("name, write, message", UNREADABLE)
def test_unreadable_files(tmp_path, name, write, message):
    model = small_model()
    write(tmp_path / name, dict(model.state_dict()))
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(model, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_the_model_must_be_one_of_ours(tmp_path):
    with pytest.raises(TypeError, match="model: got Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "a.pth")
