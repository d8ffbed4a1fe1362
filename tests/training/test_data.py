"""Sources of images, from files to batches."""

import os
import pickle
import pickletools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from t2tvit.data import load_image, open_split
from t2tvit.data.sources import SyntheticImages
from t2tvit.errors import InputError, LabelError, OneRankError
from t2tvit.training.config import RunConfig, resolve
from t2tvit.training.distributed import World
from t2tvit.training.pipeline import (
    Normalize,
    batches,
    begin_epoch,
    eval_loader,
    open_data,
    open_splits,
    train_loader,
    train_transform,
)

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def pixels_of(split) -> np.ndarray:
    return np.stack([np.asarray(image) for image, _ in split.images])


# Digits


def test_digits_have_a_fixed_split():
    train, val = open_split("digits", "train"), open_split("digits", "val")
    assert (len(train.images), len(val.images)) == (1437, 360)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert pixels_of(train).shape == (1437, 8, 8)
    # The held-out images are the same in every run, or results could not be compared.
    assert [val.images[index][1] for index in range(10)] == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]
    counts = Counter(label for _, label in val.images)
    assert set(counts.values()) <= {35, 36, 37}


def test_digits_statistics_are_those_of_the_training_images():
    train = open_split("digits", "train")
    pixels = pixels_of(train) / 255
    np.testing.assert_allclose(pixels.mean(), train.mean[0], atol=1e-4)
    np.testing.assert_allclose(pixels.std(), train.std[0], atol=1e-4)


# CIFAR


def python2_pickle(content: dict) -> bytes:
    """A protocol-2 pickle with Python 2's byte strings, like the published files."""
    data = bytearray(pickle.dumps(content, protocol=3))
    replacements = {"SHORT_BINBYTES": b"U", "BINBYTES": b"T", "PROTO": b"\x80\x02"}
    for opcode, _, position in list(pickletools.genops(bytes(data))):
        if opcode.name in replacements:
            new = replacements[opcode.name]
            data[position : position + len(new)] = new
    return bytes(data).replace(b"numpy._core.", b"numpy.core.")  # its name before numpy 2


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path):
    """A tiny dataset in both versions: (name, python folder, binary folder, images, labels)."""
    name = request.param
    random = np.random.default_rng(0)
    files = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]}
    files = files.get(name, ["train", "test"])
    classes = 10 if name == "cifar10" else 100
    names = [f"class_{index}" for index in range(classes)]
    python, binary = tmp_path / "python", tmp_path / "binary"
    python.mkdir(), binary.mkdir()
    images, labels = [], []
    for file in files:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        label = random.integers(0, classes, 4)
        images.append(data.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(label)
        key = b"labels" if name == "cifar10" else b"fine_labels"
        content = {b"data": data, key: label.tolist(), b"batch_label": b"made for a test"}
        (python / file).write_bytes(python2_pickle(content))
        coarse = [] if name == "cifar10" else [np.full((4, 1), 7, np.uint8)]
        records = np.concatenate([*coarse, label[:, None].astype(np.uint8), data], axis=1)
        (binary / f"{file}.bin").write_bytes(records.tobytes())
    key = b"label_names" if name == "cifar10" else b"fine_label_names"
    meta = {key: [item.encode() for item in names]}
    (python / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(python2_pickle(meta))
    text = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
    (binary / text).write_text("\n".join(names) + "\n\n")
    return name, python, binary, images, labels


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar_is_read_from_both_versions(cifar, version, split):
    name, python, binary, images, labels = cifar
    part = slice(None, -1) if split == "train" else slice(-1, None)
    read = open_split(f"{name}:{python if version == 'python' else binary}", split)
    np.testing.assert_array_equal(pixels_of(read), np.concatenate(images[part]))
    assert [label for _, label in read.images] == np.concatenate(labels[part]).tolist()
    assert read.class_names[3] == "class_3"
    assert len(read.class_names) == (10 if name == "cifar10" else 100)


class Boom:
    """Pickles as a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def test_cifar_pickles_cannot_run_code(cifar, tmp_path):
    name, python, _, _, _ = cifar
    trace = tmp_path / "executed"
    file = python / ("test_batch" if name == "cifar10" else "test")
    file.write_bytes(pickle.dumps({b"data": Boom(trace), b"labels": []}))
    with pytest.raises(InputError, match="refused: the pickle names .*system"):
        open_split(f"{name}:{python}", "val")
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists(), "the file must be one that would have run code"


@pytest.mark.parametrize(
    "values", [np.ones((4, 3072)), np.array([None] * 4)], ids=["float", "object"]
)
def test_cifar_pickles_hold_bytes_only(cifar, values):
    name, python, _, _, _ = cifar
    file = python / ("test_batch" if name == "cifar10" else "test")
    file.write_bytes(python2_pickle({b"data": values, b"labels": [0] * 4}))
    with pytest.raises(InputError, match="array that is not of bytes"):
        open_split(f"{name}:{python}", "val")


class Bare:
    """Pickles as a numpy array that nothing follows."""

    def __reduce__(self):
        return np.zeros(1, np.uint8).__reduce__()[:2]


PIXELS = np.zeros((1, 3072), np.uint8)


@pytest.mark.parametrize(
    "data, labels",
    [
        pytest.param(PIXELS[:0], [], id="empty"),
        pytest.param(PIXELS, [256], id="large-label"),
        pytest.param(PIXELS, [2**70], id="huge-label"),
        pytest.param(Bare(), [0], id="array-without-values"),
    ],
)
def test_cifar_files_with_other_content_are_refused(cifar, data, labels):
    name, python, _, _, _ = cifar
    key = b"labels" if name == "cifar10" else b"fine_labels"
    file = python / ("test_batch" if name == "cifar10" else "test")
    file.write_bytes(python2_pickle({b"data": data, key: labels}))
    with pytest.raises(InputError, match="is not a batch of CIFAR"):
        open_split(f"{name}:{python}", "val")


@pytest.mark.parametrize("version", ["python", "binary"])
def test_truncated_cifar_files_are_named(cifar, version):
    name, python, binary, _, _ = cifar
    stem = "test_batch" if name == "cifar10" else "test"
    folder, file = (python, stem) if version == "python" else (binary, f"{stem}.bin")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) - 100])
    with pytest.raises(InputError, match=f"{file} is damaged"):
        open_split(f"{name}:{folder}", "val")


def test_cifar_labels_beyond_the_class_names_are_refused(cifar):
    name, _, binary, _, _ = cifar
    text = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
    (binary / text).write_text("only_one\n")
    with pytest.raises(InputError, match="names only 1 classes"):
        open_split(f"{name}:{binary}", "train")


def test_missing_cifar_says_where_it_looked(tmp_path):
    with pytest.raises(InputError, match=f"no CIFAR-10 files in {tmp_path}.*cifar10:PATH"):
        open_split(f"cifar10:{tmp_path}", "train")


# Image folders


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ of two classes; pictures of various sizes and modes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number, shape in enumerate([(40, 30, 3), (30, 40), (36, 36, 4)]):
                pixels = random.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


def test_image_folders_give_colour_images_and_sorted_classes(folder):
    split = open_split(f"imagefolder:{folder}", "train")
    assert split.class_names == ["ant", "bee"]
    assert [label for _, label in split.images] == [0, 0, 0, 1, 1, 1]
    assert {image.mode for image, _ in split.images} == {"RGB"}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_damaged_image_is_named_without_a_traceback(folder, workers, damage):
    path = folder / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:200] if damage == "truncated" else b"no image")
    config = RunConfig(img_size=32, workers=workers, batch_size=6)
    loader = eval_loader(open_split(f"imagefolder:{folder}", "val"), config, ALONE)
    with pytest.raises(InputError, match="cannot be read") as caught:
        list(batches(loader))
    assert str(path) in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_image_replaces_an_unreadable_training_image(folder, workers):
    split = open_split(f"imagefolder:{folder}", "train")
    for name in ("ant/2.png", "bee/0.png"):
        path = folder / "train" / name
        path.unlink() if name == "ant/2.png" else path.write_bytes(path.read_bytes()[:200])
    config = RunConfig(img_size=32, workers=workers, batch_size=6)
    ((images, labels, problems, *_),) = batches(train_loader(split, config, ALONE))
    assert images.shape == (6, 3, 32, 32)
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1, 1]
    missing, damaged = sorted(filter(None, problems))
    assert "ant/2.png does not exist" in missing and "bee/0.png cannot be read" in damaged


def test_an_exit_in_the_middle_of_an_epoch_does_not_wait_for_the_workers():
    leave = """
import torch
from t2tvit.data import open_split
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.pipeline import eval_loader

config = RunConfig(img_size=16, workers=1, batch_size=1)
world = World(0, 1, torch.device("cpu"))
held = iter(eval_loader(open_split("synthetic:64", "val"), config, world))
next(held)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", leave], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_folder_without_a_readable_image_is_refused(folder):
    for path in folder.glob("train/*/*"):
        path.write_bytes(b"no image")
    config = RunConfig(data=f"imagefolder:{folder}", img_size=32, workers=0, batch_size=6)
    with pytest.raises(InputError, match="none of the 6 training images can be read: image .*ant"):
        open_data(config, ALONE, open_splits(config))


def test_a_decoder_error_names_the_image(folder, monkeypatch):
    path = folder / "val" / "bee" / "1.png"

    def fail(self, mode):
        raise IndexError("pop from an empty list")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(InputError, match=f"image {path} cannot be read .*empty list"):
        load_image(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_policies_support_any_number_of_channels(channels):
    config = RunConfig(auto_augment="rand-m9-n4-inc1", img_size=32)
    transform = train_transform(config, (0.5,) * channels)
    image = Image.new("L" if channels == 1 else "RGB", (40, 40))
    for _ in range(50):
        assert transform(image).shape == (channels, 32, 32)


def test_image_folders_that_differ_in_classes_are_refused(folder):
    (folder / "val" / "cat").mkdir()
    with pytest.raises(InputError, match="differ in their class folders: cat"):
        open_split(f"imagefolder:{folder}", "train")


def test_an_empty_class_is_refused(folder):
    for path in (folder / "train" / "ant").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no valid file for the classes ant"):
        open_split(f"imagefolder:{folder}", "train")


def test_a_resumed_run_keeps_its_order_of_classes(folder):
    for split in ("train", "val"):
        for old, new in (("ant", "10"), ("bee", "9")):
            (folder / split / old).rename(folder / split / new)
    config = RunConfig(data=f"imagefolder:{folder}", img_size=32, workers=0, batch_size=6)
    assert open_splits(config)[0].class_names == ["9", "10"]
    for split in open_splits(config, ["10", "9"]):
        assert split.class_names == ["10", "9"]
        assert [split.images.paths[i].split(os.sep)[-2] for i in (0, 5)] == ["10", "9"]
    assert open_splits(config, ["8", "9"])[0].class_names == ["9", "10"]


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_damaged_held_out_image_is_found_before_training(folder, damage):
    path = folder / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:200] if damage == "truncated" else b"no image")
    config = RunConfig(data=f"imagefolder:{folder}", img_size=32, workers=0, batch_size=6)
    with pytest.raises(OneRankError, match="bee/1.png cannot be read"):
        open_data(config, ALONE, open_splits(config))


def test_system_files_are_ignored_and_other_files_are_counted(folder):
    for split in ("train", "val"):
        (folder / split / ".ipynb_checkpoints").mkdir()
        for name in ("._0.png", "Thumbs.db", "notes.txt"):
            (folder / split / "ant" / name).write_bytes(b"")
    config = RunConfig(data=f"imagefolder:{folder}", img_size=32, workers=0, batch_size=6)
    data = open_data(config, ALONE, open_splits(config))
    assert (len(data.split.images), data.split.class_names) == (6, ["ant", "bee"])
    assert data.skipped == {".txt": 2}


# Specifications


def test_some_of_the_digits_are_renumbered():
    whole, some = open_split("digits", "val"), open_split("digits:907", "val")
    expected = [(image.tobytes(), label) for image, label in whole.images if label in (0, 7, 9)]
    assert some.class_names == ["0", "7", "9"]
    assert [(image.tobytes(), (0, 7, 9)[label]) for image, label in some.images] == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ("digit", "unknown source 'digit'; did you mean 'digits'?"),
        ("digits:here", "digits is built in"),
        ("digits:", "digits:01234 for some"),
        ("digits:7", "digits:01234 for some"),
        ("digits:33", "digits:01234 for some"),
        ("imagefolder", "imagefolder:PATH with train/ and val/"),
        ("imagefolder:/nowhere", "/nowhere/train does not exist"),
        ("synthetic:few", "expected synthetic:IMAGES"),
        ("synthetic:3", "at least 4 images"),
        ("imagefolder:~nobody-of-this-name/x", "data: ~nobody-of-this-name/x: "),
        ("cifar10:~nobody-of-this-name", "data: ~nobody-of-this-name: "),
    ],
)
def test_bad_specifications(spec, message):
    with pytest.raises(InputError, match=message):
        open_split(spec, "train")


def test_synthetic_images_are_the_same_each_time_and_differ_between_splits():
    first, again = (open_split("synthetic:8", "train", img_size=(20, 30)) for _ in range(2))
    np.testing.assert_array_equal(pixels_of(first), pixels_of(again))
    assert pixels_of(first).shape == (8, 20, 30, 3)
    val = open_split("synthetic:8", "val", img_size=(20, 30))
    assert len(val.images) == 2
    assert not np.array_equal(pixels_of(val), pixels_of(first)[:2])


# Batches


def test_normalisation_is_that_of_the_definition():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    torch.testing.assert_close(
        Normalize(mean, std, CPU)(images).double(), expected, atol=1e-5, rtol=0
    )


def test_random_erasing_erases():
    normalize = Normalize((0.0,), (1.0,), CPU, random_erasing=1.0)
    images = normalize(torch.full((4, 1, 32, 32), 255, dtype=torch.uint8))
    changed = (images != 1).flatten(1).float().mean(dim=1)
    assert ((changed > 0.01) & (changed < 0.5)).all()


@pytest.mark.parametrize("name", ["digits", "imagenet/t2t_vit_14"])
def test_recipes_deliver_uint8_of_the_configured_size(name):
    config = replace(resolve(name, {}), img_size=(32, 48))
    grey = name == "digits"
    image = Image.new("L" if grey else "RGB", (60, 50))
    out = train_transform(config, (0.5,) if grey else (0.5,) * 3)(image)
    assert out.dtype == torch.uint8 and out.shape == (1 if grey else 3, 32, 48)


def test_the_batches_of_all_ranks_are_those_of_a_single_process():
    config = RunConfig(data="synthetic:22", num_classes=1000, img_size=16, workers=0, batch_size=8)
    config = replace(config, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0)
    split = open_split(config.data, "train", img_size=(16, 16), num_classes=1000)

    def labels(rank, size):
        loader = train_loader(split, config, World(rank, size, CPU))
        loader.sampler.set_epoch(3)
        return [batch.tolist() for _, batch, *_ in loader]

    whole, first, second = labels(0, 1), labels(0, 2), labels(1, 2)
    assert len(whole) == 2  # the incomplete third batch is left out
    for batch, one, two in zip(whole, first, second, strict=True):
        assert sorted(batch) == sorted(one + two)


def test_a_batch_that_the_processes_cannot_divide_becomes_smaller():
    config = RunConfig(batch_size=32)
    assert [config.batch_per_process(size) for size in (1, 2, 3)] == [32, 16, 10]
    config = replace(config, batch_size=20, mixup=0.8)
    assert [config.batch_per_process(size) for size in (1, 3, 4)] == [20, 6, 4]


def test_padded_crops_move_the_whole_image_over_black():
    config = RunConfig(crop_padding=8, img_size=(32, 48), hflip=0)
    transform = train_transform(config, (0.5,) * 3)
    shifts = Counter()
    for _ in range(50):
        image = transform(Image.new("RGB", (16, 16), "white"))
        assert image.shape == (3, 32, 48) and set(image.unique().tolist()) <= {0, 255}
        rows, columns = (image[0] == 255).any(dim=1), (image[0] == 255).any(dim=0)
        shifts[32 - int(rows.sum()), 48 - int(columns.sum())] += 1
    assert len(shifts) > 20 and all(max(shift) <= 8 for shift in shifts)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_sees_each_image_exactly_once(size):
    config = RunConfig(img_size=16, workers=0, batch_size=4, crop_pct=1)
    split = open_split("synthetic:44", "val", img_size=(16, 16))
    seen = [
        image.numpy().tobytes()
        for rank in range(size)
        for images, _ in eval_loader(split, config, World(rank, size, CPU))
        for image in images
    ]
    expected = [np.asarray(image).transpose(2, 0, 1).tobytes() for image, _ in split.images]
    assert Counter(seen) == Counter(expected)


@pytest.mark.parametrize(
    "options, world, message",
    [
        ({"batch_size": 2}, World(0, 3, CPU), "batch_size: got 2, too few for 3 processes"),
        ({"batch_size": 64}, ALONE, "batch_size: got 64, but the data has only 44 training images"),
        ({"mean": (0.5,)}, ALONE, "mean: got 1 numbers, expected 3, one per channel"),
        ({"auto_augment": "randm9"}, ALONE, "auto_augment: timm cannot read the policy 'randm9'"),
        ({"auto_augment": "rand-k9"}, ALONE, "auto_augment: timm cannot read the policy"),
        ({"auto_augment": "rand-mx-m9x"}, ALONE, "auto_augment: timm cannot read the policy"),
    ],
)
def test_data_that_does_not_fit_the_configuration(options, world, message):
    config = RunConfig(**{"data": "synthetic:44", "img_size": 16, "batch_size": 8} | options)
    with pytest.raises(InputError, match=message):
        open_data(config, world, open_splits(config))


def test_an_error_is_attributed_to_a_policy_only_if_there_is_one(monkeypatch):
    def fail(images, index):
        raise ZeroDivisionError

    monkeypatch.setattr(SyntheticImages, "__getitem__", fail)
    config = RunConfig(data="synthetic:44", img_size=16, batch_size=8)
    with pytest.raises(ZeroDivisionError):
        open_data(config, ALONE, open_splits(config))
    config = replace(config, auto_augment="rand-m9")
    with pytest.raises(InputError, match="auto_augment: rand-m9 fails on the images"):
        open_data(config, ALONE, open_splits(config))


def test_repeated_images_get_new_augmentation_and_fill_the_batches():
    config = RunConfig(data="synthetic:24", num_classes=1000, img_size=16, workers=0, batch_size=6)
    config = replace(config, repeated_augmentation=3)
    split = open_split(config.data, "train", img_size=(16, 16), num_classes=1000)

    def samples(rank, size, step=0):
        loader = train_loader(split, config, World(rank, size, CPU))
        begin_epoch(loader, 1, step)
        return [list(zip(batch.name.tolist(), batch.image)) for batch in loader]

    whole = samples(0, 1)
    assert [len(batch) for batch in whole] == [6] * 4
    for batch in whole:
        assert [index for index, _ in batch[:3]] == 3 * [batch[0][0]]
        assert not torch.equal(batch[0][1], batch[1][1])
    for batch, *halves in zip(whole, samples(0, 2), samples(1, 2), strict=True):
        together = [each for pair in zip(*halves, strict=True) for each in pair]
        assert [index for index, _ in together] == [index for index, _ in batch]
        for (_, one), (_, other) in zip(together, batch, strict=True):
            assert torch.equal(one, other)
    for (_, one), (_, other) in zip(samples(0, 1, 2)[0], whole[2], strict=True):
        assert torch.equal(one, other)


def test_data_sets_of_timm_are_opened_by_their_names(monkeypatch):
    import timm.data

    class Images:
        classes = ["cat", "dog"]

        def __len__(self):
            return 5

        def __getitem__(self, index):
            if index == 4:
                raise OSError("broken")
            return Image.new("L", (20, 30), 9), np.int64(index % 2)

    asked = []

    def create_dataset(name, root, split, **_):
        asked.append((name, root, split))
        return Images()

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    split = open_split("timm:torch/pets:some/where", "val")
    assert asked == [("torch/pets", "some/where", "validation")]
    assert (split.class_names, len(split.images)) == (["cat", "dog"], 5)
    image, label = split.images[1]
    assert (image.mode, label, type(label)) == ("RGB", 1, int)
    with pytest.raises(InputError, match="image 4 cannot be read"):
        split.images[4]
    monkeypatch.setattr(Images, "classes", ["cat"])
    split = open_split("timm:torch/pets:some/where", "val")
    with pytest.raises(LabelError, match="image 1 has the label 1, expected 0 to 0"):
        split.images[1]


def test_image_files_of_timm_are_opened_as_all_others(folder):
    path = folder / "val" / "ant" / "0.png"
    Image.fromarray(np.full((9, 9), 257 * 80, np.uint16)).save(path)
    split = open_split(f"timm:torch/image_folder:{folder}", "val")
    assert np.asarray(split.images[0][0]).max() == 80
    Image.new("RGB", (9, 9)).save(path, "EPS")
    with pytest.raises(InputError, match="not an image in one of the formats"):
        split.images[0]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("timm:pets", "expected a name such as timm:hfds/OWNER/NAME"),
        ("timm:torch/no_such_set", "no_such_set"),
        ("timm:hfds/nobody/nothing", "nobody/nothing"),
        ("timm:hfds//etc", "not a URL or the path"),
        ("timm:HFDS/./nothing", "not a URL or the path"),
        ("timm:hfds/../nobody/nothing", "not a URL or the path"),
        ("timm:hfds/a/b/c.zip", "not a URL or the path"),
        ("timm:hfds/tests/training", "not a URL or the path"),
        ("synthetic:1000000000000", "at most 10,000,000"),
        ("synthetic:" + "9" * 5000, "at most 10,000,000"),
    ],
)
def test_data_sets_that_timm_cannot_open(spec, message):
    with pytest.raises(InputError, match=message):
        open_split(spec, "train")
