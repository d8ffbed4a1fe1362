"""Checkpoints: wrappers, prefixes, other sizes and heads, and invalid files."""

import argparse
import logging
import os
import pickle
import tarfile
import zipfile
from functools import partial
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


def test_the_average_is_preferred_and_options_are_ignored(tmp_path):
    """A published file has the epoch, options in a Namespace, optimiser, weights and average."""
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


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"net": prefixed(state, "module."), "acc": 98.3, "epoch": 60},
        lambda state: {"model_state": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"ema": {"module": state, "decay": 0.99}},
        lambda state: {"anything": state, "rng": {"torch": torch.get_rng_state()}},
        lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 1}},
        lambda state: {"state_dict": prefixed(state, "backbone."), "meta": {"CLASSES": ["a"]}},
        lambda state: {"state_dict": state, "metric": np.float64(81.5)},
        lambda state: {
            "model": state,
            "args": argparse.Namespace(lr=np.float32(1e-3), output=Path("/x"), seeds=np.arange(3)),
        },
    ],
)
def test_weights_are_found_in_files_of_other_programs(tmp_path, content, caplog):
    source, model = small_model(1), small_model(2)
    state = source.state_dict()
    torch.save(content(state), tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert_same_weights(model, state)
    assert not caplog.records


def test_one_of_several_is_used_and_named(tmp_path, caplog):
    last, average, model = small_model(1), small_model(2), small_model(3)
    content = {"model": last.state_dict(), "model_ema": average.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    assert load_checkpoint(model, tmp_path / "a.pth").wrapper == "model_ema"
    assert_same_weights(model, average.state_dict())
    assert "holds the weights model, model_ema; model_ema is used" in caplog.text


def test_counters_of_thop_are_ignored(tmp_path, caplog):
    source, model = small_model(1), small_model(2)
    state = dict(source.state_dict())
    for name in ("total_ops", "total_params", "blocks.0.total_ops"):
        state[name] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    assert_same_weights(model, source.state_dict())
    assert "ignored the counters of thop: total_ops, total_params and 1 more" in caplog.text


def test_the_content_determines_the_format(tmp_path):
    source, model = small_model(1), small_model(2)
    save_file(source.state_dict(), tmp_path / "a.pth")
    torch.save(source.state_dict(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        load_checkpoint(model, tmp_path / name)
        assert_same_weights(model, source.state_dict())
        model = small_model(3)


def test_a_missing_head_is_initialised(tmp_path, caplog):
    source, model = small_model(1), small_model(2)
    torch.save(small_model(1, num_classes=0).state_dict(), tmp_path / "a.pth")
    report = load_checkpoint(model, tmp_path / "a.pth")
    assert report.dropped_classes == 0
    assert "no head; the model has a new one of 10" in caplog.text
    assert_same_weights(model, source.state_dict(), but=["head."])
    with pytest.raises(InputError, match="has no head"):
        load_checkpoint(model, tmp_path / "a.pth", new_head=False)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match="has 10 classes, the model 4; give --num-classes 10"):
        load_checkpoint(small_model(2, num_classes=4), tmp_path / "a.pth", new_head=False)


def test_non_finite_weights_are_reported(tmp_path, caplog):
    state = small_model(1).state_dict()
    state["head.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(small_model(2), tmp_path / "a.pth")
    assert "not finite: head.weight" in caplog.text


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution", "patch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_for_grey_and_for_colour_images_agree(tmp_path, tokens_type, channels, caplog):
    """A grey image, and the colour image of three equal channels."""
    options = dict(tokens_type=tokens_type, fused_kernels="reference")
    source = small_model(1, in_chans=channels, **options).double().eval()
    model = small_model(2, in_chans=4 - channels, **options).double().eval()
    torch.nn.init.normal_(source.head.weight)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert load_checkpoint(model, tmp_path / "a.pth").in_chans == (channels, 4 - channels)
    assert f"weights for {channels} channels adapted to {4 - channels}" in caplog.text
    grey = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    images = {1: grey, 3: grey.expand(-1, 3, -1, -1)}
    with torch.no_grad():
        torch.testing.assert_close(model(images[4 - channels]), source(images[channels]))


def test_the_channels_of_a_token_are_kept_in_order(tmp_path):
    """Tokens are ordered (channel, row, column)."""
    source, model = small_model(1), small_model(2, in_chans=1)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_checkpoint(model, tmp_path / "a.pth")
    kqv = source.tokens_to_token.attention1.kqv.weight
    torch.testing.assert_close(
        model.tokens_to_token.attention1.kqv.weight, kqv.unflatten(1, (3, 49)).sum(1)
    )


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
    with pytest.raises(
        InputError,
        match=r"12 positions .* not a square grid.*--img-size HEIGHT WIDTH.*grid_size=\(h, w\)",
    ):
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
def test_a_mismatch_names_the_keys_and_does_not_change_the_model(tmp_path, changes, message):
    model = small_model(2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.save(change(small_model(1).state_dict(), **changes), tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        load_checkpoint(model, tmp_path / "a.pth")
    assert_same_weights(model, before)


def test_another_architecture_is_a_mismatch(tmp_path):
    torch.save(small_model(1).state_dict(), tmp_path / "a.pth")
    message = (
        "holds 1 block of width 256 on performer tokens, the model is 1 .* transformer tokens$"
    )
    with pytest.raises(InputError, match=message):
        load_checkpoint(small_model(2, tokens_type="transformer"), tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["t2t_vit_19", "t2t_vit_t_14", "vit_s_16_se", "t2t_vit_dense"])
def test_a_published_model_is_recognised(tmp_path, name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    torch.save(
        {key: torch.zeros(tensor.shape) for key, tensor in state.items()}, tmp_path / "a.pth"
    )
    with pytest.raises(InputError) as caught:
        load_checkpoint(create_model("t2t_vit_14"), tmp_path / "a.pth")
    assert "the model is t2t_vit_14 (14 blocks of width 384 on performer tokens)" in str(
        caught.value
    )
    blocks = {"t2t_vit_19": "19 blocks of width 448", "t2t_vit_t_14": "14 blocks of width 384"}
    assert name == "t2t_vit_dense" or f"holds {name} (" in str(caught.value)
    assert blocks.get(name, "blocks of width") in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_not_floating_point(tmp_path, dtype):
    state = {key: tensor.to(dtype) for key, tensor in small_model(1).state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match=f"holds weights that are {dtype}, expected floating-point"
    ):
        load_checkpoint(small_model(2), tmp_path / "a.pth")


def test_other_numbers_of_channels(tmp_path):
    torch.save(small_model(1, in_chans=4).state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match="is for images with 4 channels, the model for 3"):
        load_checkpoint(small_model(2), tmp_path / "a.pth")


def test_weights_of_something_else(tmp_path):
    torch.save({f"layer{i}.weight": torch.ones(1) for i in range(200)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"holds no T2T-ViT \(its tensors are layer0\.weight, "):
        load_checkpoint(small_model(), tmp_path / "a.pth")


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
    with pytest.raises(
        InputError, match=r"could run code, so it is not read.*state dict only"
    ) as caught:
        load_checkpoint(small_model(), path)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value), "advice to load unsafely"
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file was harmless, so this test shows nothing"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(6))
def test_code_in_any_protocol_is_recognised(tmp_path, protocol, zipped, recwarn):
    path, proof = tmp_path / "a.pth", tmp_path / "it-ran"
    options = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    torch.save({"state_dict": {"weight": torch.ones(2)}, "args": Code(proof)}, path, **options)
    with pytest.raises(InputError, match="could run code") as caught:
        load_checkpoint(small_model(), path)
    assert not proof.exists() and not recwarn.list
    assert "truncated" not in str(caught.value)
    named = ("holds pathlib.Path.touch,", "holds getattr,", "holds __builtin__.getattr,")
    assert not zipped or any(name in str(caught.value) for name in named)


def test_a_pickle_of_text_is_recognised(tmp_path):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": Code(tmp_path / "it-ran")}, protocol=0))
        with pytest.raises(InputError, match="is a pickle .*could run code"):
            load_checkpoint(small_model(), tmp_path / name)
    assert not (tmp_path / "it-ran").exists()


def test_a_small_file_cannot_use_all_time_or_memory(tmp_path):
    shared = {f"k{number}": 0 for number in range(1000)}
    for _ in range(6):
        shared = dict.fromkeys(shared, shared)
    torch.save(shared, tmp_path / "shared.pth")
    with pytest.raises(InputError, match="entries that are not tensors: k0"):
        load_checkpoint(small_model(), tmp_path / "shared.pth")
    deep = torch.ones(2)
    for _ in range(300):
        deep = {"a": deep}
    torch.save(deep, tmp_path / "deep.pth")
    with pytest.raises(InputError, match="entries that are not tensors: a"):
        load_checkpoint(small_model(), tmp_path / "deep.pth")
    number = (100 * 2**30).to_bytes(5, "little")
    with zipfile.ZipFile(tmp_path / "bytes.pth", "w") as archive:
        archive.writestr(
            "a/data.pkl", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + number + b"\x85R."
        )
        archive.writestr("a/version", "3\n")
    with pytest.raises(InputError, match="holds a bytearray, .*fill the memory"):
        load_checkpoint(small_model(), tmp_path / "bytes.pth")


def truncated(path, content):
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_safetensors(path, content):
    save_file(content, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def module(path, content):
    torch.save(torch.nn.Linear(2, 2), path)


def pickled_module(path, content):
    path.write_bytes(pickle.dumps(torch.nn.Linear(2, 2)))


def zipped(path, content, name="archive/data.pkl", **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(name, bytes(1_000_000))


def compressed(path, content):
    torch.save(content, path)
    with zipfile.ZipFile(path) as source:
        records = {record.filename: source.read(record) for record in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def tarred(path, content):
    torch.save(content, path.with_name("inside"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("inside"), "inside")


def run_folder(path, content):
    path.mkdir()
    (path / "best.safetensors").write_bytes(b"")


def training_state(path, content):
    save_file(content, path, {"t2tvit_state": "{}"})


def write(content):
    return lambda path, state: (
        path.write_bytes if isinstance(content, bytes) else path.write_text
    )(content)


def fifo(path, content):
    os.mkfifo(path)


def larger_than_memory(path, content):
    save_file(content, path)
    os.truncate(path, 2**43)


PAGE = "<!DOCTYPE html><html>Google Drive - Virus scan warning</html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 86\n"
UNREADABLE = [
    ("a.pth", lambda path, state: None, "does not exist"),
    ("a.pth", lambda path, state: path.mkdir(), "is a folder, not a file"),
    ("run", run_folder, "is the folder of a run; give --run"),
    ("a" * 3000, lambda path, state: None, "does not exist"),
    ("a.pth", fifo, "not a regular file"),
    ("a.pth", lambda path, state: path.symlink_to("/dev/zero"), "not a regular file"),
    ("a.safetensors", larger_than_memory, r"too large \(it has 8,796,093,022,208 bytes"),
    ("a.pth", write(b""), "is empty"),
    ("a.pth", write("hello"), "is a text file, not weights; it begins with 'hello'"),
    ("a.yaml", write("model: t2t_vit_7\n"), "is a YAML file, not weights"),
    ("a.pth", write('{"a": 1}'), "is a JSON file, not weights"),
    ("a.pth", write(PAGE), "is an HTML page"),
    ("a.safetensors", write(PAGE), "is an HTML page"),
    ("a.pth", write(POINTER), "is a Git LFS pointer"),
    ("a.safetensors", write(POINTER), "is a Git LFS pointer"),
    ("a.pth", write(b"\xff\xd8\xff\xe0" + bytes(100)), "is a JPEG image"),
    ("a.pth", write(bytes(range(1, 256)) * 9), "is neither a PyTorch nor a safetensors file"),
    ("a.pth", truncated, "is truncated or damaged"),
    ("a.safetensors", truncated_safetensors, "is truncated"),
    ("a.pth", tarred, "is a tar archive"),
    ("a.pth", partial(zipped, name="a.txt"), "is a zip archive without a PyTorch checkpoint"),
    ("a.pth", partial(zipped, compression=zipfile.ZIP_DEFLATED), "expands to 1000000 bytes"),
    ("a.pth", compressed, "torch.save does not compress"),
    ("a.safetensors", training_state, "is the training state of a run"),
    ("a.pth", module, r"holds torch\.nn\.modules\.linear\.Linear"),
    ("a.pth", pickled_module, "is a pickle not written by torch.save"),
    ("a.pth", lambda path, state: torch.save([1], path), "got a list in .* expected a state dict"),
    ("a.pth", lambda path, state: torch.save({}, path), "holds nothing"),
    ("a.pth", lambda path, state: torch.save({"model": {}}, path), "in its model nothing"),
    ("a.pth", lambda path, state: torch.save({"epoch": 1}, path), "not tensors: epoch"),
    ("a.pth", lambda path, state: torch.save({1: torch.ones(1)}, path), "not tensors: 1"),
    (
        "a.pth",
        lambda path, state: torch.save({**state, **prefixed(state, "module.")}, path),
        "are not unique without their prefixes",
    ),
    (
        "a.pth",
        lambda path, state: torch.save({"student": state, "teacher": state}, path),
        "several sets of weights: student, teacher",
    ),
    (
        "a.pth",
        lambda path, state: torch.save({"pos_embed": torch.ones(1).expand(10**9)}, path),
        r"with a larger tensor of \(1000000000,\)",
    ),
    (
        "a.pth",
        lambda path, state: torch.save({"pos_embed": torch.ones(1, 2).to_sparse()}, path),
        "tensors that are torch.sparse_coo cpu, expected plain ones",
    ),
]


@pytest.mark.parametrize("name, write, message", UNREADABLE)
def test_unreadable_files(tmp_path, name, write, message):
    model = small_model()
    write(tmp_path / name, dict(model.state_dict()))
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(model, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "weights_only" not in str(caught.value), "advice to load unsafely"


def test_the_model_must_be_one_of_ours(tmp_path):
    with pytest.raises(TypeError, match="model: got Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "a.pth")
