"""Files of states and weights: written atomically, and never run."""

import contextlib
import errno
import os
import random
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import t2tvit
from t2tvit.errors import InputError, RunError
from t2tvit.files import write_atomically
from t2tvit.training.checkpointing import Weights, read_about, save_weights
from t2tvit.training.checkpointing.weights import METADATA_KEY
from t2tvit.training.randomness import drawing_from, rng_state, seed_everything, set_rng_state


@pytest.mark.parametrize(
    "error, expected",
    [(OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full-disk", "interrupt"],
)
def test_a_failed_write_leaves_the_old_file(error, expected, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(expected):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL], ids=["failing", "unsupported"])
def test_a_folder_that_cannot_be_synchronised(number, tmp_path, monkeypatch):
    """An error is reported, but some file systems do not support it; its descriptor is closed."""
    folders, fsync = [], os.fsync

    def fail_for_folders(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return fsync(descriptor)
        folders.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail_for_folders)
    outcome = contextlib.nullcontext()
    if number == errno.EIO:
        outcome = pytest.raises(RunError, match="file is written, but its folder cannot be")
    with outcome:
        write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert len(folders) == 1
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(folders[0])


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_generators_continue_their_sequences(tmp_path):
    seed_everything(3)
    np.random.randn()  # leaves a second normal in store, which is part of the state
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draw()
    seed_everything(4)
    assert draw() != expected
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_weights_describe_their_model(tmp_path):
    args = {"img_size": [32, 48], "num_classes": 3, "in_chans": 1, "depth": 1}
    model = t2tvit.create_model("t2t_vit_7", **args)
    about = Weights("t2t_vit_7", args, ["a", "b", "ü"], {"lr": 0.1}, epoch=4, top1=61.5)
    path = tmp_path / "w.safetensors"
    save_weights(model, path, about)
    read = read_about(path)
    assert read == about
    again = t2tvit.create_model(read.model, **read.create_args)
    t2tvit.load_checkpoint(again, path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_weights_whose_bytes_have_changed_are_refused(tmp_path):
    args = {"img_size": [32, 32], "num_classes": 3, "depth": 1}
    path = tmp_path / "w.safetensors"
    save_weights(t2tvit.create_model("t2t_vit_7", **args), path, Weights("t2t_vit_7", args, [], {}))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="w.safetensors is damaged .its checksum"):
        read_about(path)


def test_drawing_for_an_image_does_not_change_the_generators_of_the_run():
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    with drawing_from(1, 2, 3):
        first = draw()
    assert draw() == expected
    with drawing_from(1, 2, 4):
        assert draw() != first
    with drawing_from(1, 2, 3):
        assert draw() == first


def test_tied_weights_are_kept(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "tied.safetensors", Weights("timm:tied", {}, None, {}))
    stored = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(stored["0.weight"], stored["1.weight"])


DEEP = "[" * 100_000 + "]" * 100_000
CONTENTS = ['{"model": "t2t_vit_7"}', "[]", "no JSON", '{"sha256": "a", "content": 3}', DEEP]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda text: text[:12])
def test_weights_without_a_checksum_are_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path, {METADATA_KEY: content})
    with pytest.raises(InputError, match="weights.safetensors is damaged"):
        read_about(path)
