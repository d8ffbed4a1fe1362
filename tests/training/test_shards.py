"""Tar shards: readers, exact resuming, damaged files."""

import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from t2tvit.cli import main
from t2tvit.data import open_split
from t2tvit.data.shards import read_shard
from t2tvit.errors import InputError, LabelError, OneRankError
from t2tvit.training.checkpointing import Checkpointer
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.pipeline import (
    batches,
    begin_epoch,
    eval_loader,
    open_data,
    open_splits,
    train_loader,
)
from tests.support.training.equality import assert_equal, without_times
from tests.support.training.tiny import TINY, metrics_of, state_of

pytest.importorskip("webdataset")
SIZES = {"train": (9, 12, 7, 10, 6), "val": (5, 6)}
CONFIG = RunConfig(img_size=24, num_classes=4, workers=0, batch_size=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """train-NNN.tar and val-NNN.tar of various lengths; image i of a shard has colour i."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for split, sizes in SIZES.items():
        for number, size in enumerate(sizes):
            with tarfile.open(folder / f"{split}-{number:03d}.tar", "w") as shard:
                for image in range(size):
                    content = io.BytesIO()
                    pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(content, "png")
                    files = {"png": content.getvalue(), "cls": str(image % 4).encode()}
                    for suffix, data in files.items():
                        member = tarfile.TarInfo(f"{split}{number}/{image:04d}.{suffix}")
                        member.size = len(data)
                        shard.addfile(member, io.BytesIO(data))
    return folder


def batches_of(folder, world, step=0, **changes):
    """The batches of the first epoch from ``step`` on, as places and pixels."""
    config = replace(CONFIG, **changes)
    split = open_split(f"webdataset:{folder}", "train", num_classes=4)
    loader = train_loader(split, config, world)
    begin_epoch(loader, 0, step)
    return [(list(batch.name), batch.image) for batch in loader]


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 1), (1, 2), (3, 1)])
def test_readers_share_the_shards_and_every_rank_has_the_same_batches(shards, ranks, workers):
    worlds = [World(rank, ranks, torch.device("cpu")) for rank in range(ranks)]
    parts = [batches_of(shards, world, batch_size=2 * ranks, workers=workers) for world in worlds]
    steps = sum(SIZES["train"]) // (2 * ranks)
    assert [len(part) for part in parts] == [steps] * ranks
    seen = [{name for names, _ in part for name in names} for part in parts]
    for rank in range(1, ranks):
        assert not seen[0] & seen[rank]
    if ranks * max(workers, 1) == 1:
        assert len(set.union(*seen)) == sum(SIZES["train"])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumes_at_any_batch(shards, workers):
    alone = World(0, 1, torch.device("cpu"))
    whole = batches_of(shards, alone, workers=workers)
    for step in (1, 4, len(whole)):
        assert_equal(batches_of(shards, alone, step, workers=workers), whole[step:])
    order = [name for names, _ in whole for name in names]
    assert order != sorted(order)


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 0), (3, 1)])
def test_evaluation_reads_each_image_once(shards, ranks, workers):
    split = open_split(f"webdataset:{shards}", "val", num_classes=4)
    config = replace(CONFIG, workers=workers, crop_pct=1.0)
    seen = Counter(
        image.numpy().tobytes()
        for rank in range(ranks)
        for images, _ in eval_loader(split, config, World(rank, ranks, torch.device("cpu")))
        for image in images
    )
    assert len(split.images) == sum(SIZES["val"]) == len(seen) and set(seen.values()) == {1}


def test_an_interrupted_run_on_shards_ends_like_an_uninterrupted_one(shards, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--data", f"webdataset:{shards}", "--epochs", "2", "--checkpoint-minutes", "0")
    assert main(["train", *TINY, *options, "--output", str(whole)]) == 0

    after_step = Checkpointer.after_step

    def interrupted(self, trainer):
        after_step(self, trainer)
        if trainer.updates == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "after_step", interrupted)
        assert main(["train", *TINY, *options, "--output", str(parts)]) == 130
    assert main(["train", "--output", str(parts), "--resume", "auto"]) == 0
    first, second = state_of(whole)["state"], state_of(parts)["state"]
    assert_equal(first["model"], second["model"])
    assert without_times(metrics_of(whole)) == without_times(metrics_of(parts))


def test_unreadable_images_are_named_and_replaced_by_the_next(shards, tmp_path):
    for path in shards.glob("*.tar"):
        content = bytearray(path.read_bytes())
        if path.name == "train-001.tar":
            content = content[: len(content) // 2]
        if path.name == "train-002.tar":
            start = content.index(b"\x89PNG")
            content[start : start + 8] = b"no image"
        (tmp_path / path.name).write_bytes(content)
    (tmp_path / "_info.json").write_text(
        '{"splits": {"train": {"filenames": ["train-000.tar", "train-001.tar", "train-002.tar",'
        ' "train-003.tar", "train-004.tar"], "shard_lengths": [9, 12, 7, 10, 6]}}}'
    )
    config = replace(CONFIG, data=f"webdataset:{tmp_path / '{split}-*.tar'}")
    with pytest.raises(InputError, match="train-001.tar cannot be read"):
        open_data(config, World(0, 1, torch.device("cpu")), open_splits(config))
    split = open_split(f"webdataset:{tmp_path}", "train", num_classes=4)
    loader = train_loader(split, CONFIG, World(0, 1, torch.device("cpu")))
    problems = {problem for batch in loader for problem in batch.problem if problem}
    assert any("train-001.tar cannot be read" in problem for problem in problems)
    assert any("train-002.tar/train2/0000 cannot be read" in problem for problem in problems)
    assert len(problems) == 2


@pytest.mark.parametrize("label", [b"cat", None])
def test_a_sample_without_a_label_does_not_affect_others(shards, tmp_path, label):
    with (
        tarfile.open(shards / "train-000.tar") as old,
        tarfile.open(tmp_path / "a.tar", "w") as new,
    ):
        for member in old:
            content = old.extractfile(member).read()
            if member.name.endswith("0001.cls"):
                if label is None:
                    continue
                content, member.size = label, len(label)
            new.addfile(member, io.BytesIO(content))
    whole = [sample.place for sample in read_shard(str(shards / "train-000.tar"))]
    samples = list(read_shard(str(tmp_path / "a.tar")))
    assert isinstance(samples[1], InputError) and "0001 has " in str(samples[1])
    left = [sample.place for sample in samples if not isinstance(sample, InputError)]
    keys = [place.partition(".tar/")[2] for place in whole]
    assert [place.partition(".tar/")[2] for place in left] == keys[:1] + keys[2:]


def test_missing_shards_are_reported(shards, tmp_path):
    for spec, message in (
        (tmp_path, "has no shards for train"),
        (tmp_path / "train-{000..004}.tar", "is not a folder; give one, or a pattern with"),
        (shards / "{split}-{000..009}.tar", "train-005.tar does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            open_split(f"webdataset:{spec}", "train", num_classes=4)
    split = open_split(f"webdataset:{shards / '{split}-{000..001}.tar'}", "val")
    assert (len(split.images), split.class_names) == (11, ["0", "1", "2", "3"])


# Names and labels; files that are not shards


def picture(colour=0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 24), (colour, 0, 0)).save(content, "png")
    return content.getvalue()


def write_shard(path, files, mode="w"):
    """A tar of names and contents, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return str(path)


def samples_of(path, **options):
    return [
        str(sample)
        if isinstance(sample, InputError)
        else (sample.place.split(".tar/")[1], sample.label)
        for sample in read_shard(path, **options)
    ]


@pytest.mark.parametrize(
    "names, keys",
    [
        (["0.png", "0.cls", "1.PNG", "1.CLS"], ["0", "1"]),
        (["0.v2.png", "0.v2.cls", "1.v2.png", "1.v2.cls"], ["0.v2", "1.v2"]),
        (["a.0.png", "a.0.cls", "a.1.cls", "a.1.png"], ["a.0", "a.1"]),
        (["x.y/0.png", "x.y/0.cls"], ["x.y/0"]),
        (["./0.png", "./0.cls"], ["./0"]),
        (["0.jpg", "0.cls", "0.seg.png", "1.a.png", "1.cls", "1.jpg"], ["0", "1"]),
        (["._0.png", "__MACOSX/0.png", ".DS_Store", "__info__.json", "0.png", "0.cls"], ["0"]),
        (["0.png", "0.txt", "1.json", "1.avif"], ["0", "1"]),
        (["README", "sub/0.png", "sub/0.npy", "sub/0.cls"], ["sub/0"]),
    ],
)
def test_files_are_grouped_by_their_names(tmp_path, names, keys):
    files = [(name, picture() if name.lower()[-3:] in ("png", "jpg") else b"1") for name in names]
    assert samples_of(write_shard(tmp_path / "a.tar", files)) == [(key, 1) for key in keys]


@pytest.mark.parametrize(
    "suffix, content, found",
    [
        ("cls", b" 2\n", 2),
        ("txt", b"2", 2),
        ("txt", b"bee", 1),
        ("json", b"2", 2),
        ("json", b'{"label": 2, "caption": "a cat"}', 2),
        ("json", b'{"label": "bee"}', 1),
        ("cls", b"wasp", "the label 'wasp' in cls; expected a class number, or a name"),
        ("txt", b"A photo of a bee", "the label 'A photo of a bee' in txt; expected a class"),
        ("json", b'{"label": true}', "in json; expected a class number"),
        ("json", b"[" * 100_000, "in json; expected a class number"),
        ("cls", b"3", "the label 3, but there are 3 classes; expected 0 to 2"),
        ("cls", b"-1", "the label -1, but there are 3 classes"),
        ("cls", b"1000000000", "the label 1000000000, but there are 3 classes"),
        ("cls", b"9" * 5000, "expected a class number"),
        ("label", b"1", "0 has png, label; expected an image"),
    ],
)
def test_labels(tmp_path, suffix, content, found):
    path = write_shard(tmp_path / "a.tar", [("0.png", picture()), (f"0.{suffix}", content)])
    (sample,) = samples_of(path, classes=3, names=["ant", "bee", "cat"])
    assert sample == ("0", found) if isinstance(found, int) else found in sample


def test_absurd_labels_do_not_determine_the_number_of_classes(tmp_path):
    write_shard(tmp_path / "train-0.tar", [("0.png", picture()), ("0.cls", b"1000000000")])
    with pytest.raises(
        LabelError, match="0 has the label 1000000000, but --num-classes is not given"
    ):
        open_split(f"webdataset:{tmp_path}", "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_outside_the_classes_is_not_an_unreadable_image(shards, tmp_path, workers):
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    names = [f"train-{number:03d}.tar" for number in range(5)]
    lengths = {"train": {"filenames": names, "shard_lengths": SIZES["train"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": lengths}))
    split = open_split(f"webdataset:{tmp_path}", "train", num_classes=3)
    loader = train_loader(split, replace(CONFIG, workers=workers), World(0, 1, torch.device("cpu")))
    with pytest.raises(
        InputError, match="^data: .* has the label 3, but there are 3 classes"
    ) as caught:
        list(batches(loader))
    assert "\n" not in str(caught.value)


def test_held_out_labels_are_those_of_the_training_shards(tmp_path):
    for split, labels in (("train", "0120"), ("val", "013")):
        files = [
            (f"{i}.{s}", c)
            for i, k in enumerate(labels)
            for s, c in (("png", picture()), ("cls", k.encode()))
        ]
        write_shard(tmp_path / f"{split}-0.tar", files)
    config = replace(CONFIG, data=f"webdataset:{tmp_path}", num_classes=None)
    with pytest.raises(LabelError, match="val-0.tar/2 has the label 3, but there are 3 classes"):
        open_data(config, World(0, 1, torch.device("cpu")), open_splits(config))


def test_a_damaged_held_out_image_is_found_before_training(shards, tmp_path):
    for path in shards.glob("*.tar"):
        content = bytearray(path.read_bytes())
        if path.name == "val-001.tar":
            start = content.rindex(b"IDAT")
            content[start : start + 40] = bytes(40)
        (tmp_path / path.name).write_bytes(content)
    config = replace(CONFIG, data=f"webdataset:{tmp_path}")
    with pytest.raises(OneRankError, match="val-001.tar/val1/0005 cannot be read"):
        open_data(config, World(0, 1, torch.device("cpu")), open_splits(config))


def test_class_names_are_read_beside_the_shards(shards, tmp_path):
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n\n")
    for spec in (tmp_path, f"{tmp_path}/{{split}}-*.tar"):
        assert open_split(f"webdataset:{spec}", "val").class_names == ["ant", "bee", "cat", "dog"]
    (tmp_path / "classes.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(InputError, match="classes.txt must name each class once"):
        open_split(f"webdataset:{tmp_path}", "val")


def test_no_name_of_a_shard_reaches_a_shell(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in shards.glob("*-000.tar"):
        name = f"pipe:touch executed;cat {path.name}"
        (tmp_path / name).write_bytes(path.read_bytes())
    split = open_split("webdataset:.", "train", num_classes=4)
    assert len(list(split.images.read(split.images.shards[0]))) == SIZES["train"][0]
    for spec in ("pipe:touch executed;cat train-{split}.tar", "http://localhost/{split}.tar"):
        with pytest.raises(InputError, match="has no shards for train"):
            open_split(f"webdataset:{spec}", "train", num_classes=4)
    with pytest.raises(InputError, match="expected a name such as timm:hfds/OWNER/NAME"):
        open_split("timm:wds/x:pipe:touch executed;", "train")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("mode, kind", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_shards_are_refused(tmp_path, mode, kind):
    path = write_shard(tmp_path / "a.tar", [("0.png", picture()), ("0.cls", b"0")], mode)
    with pytest.raises(InputError, match=f"a.tar is compressed with {kind}; decompress it"):
        list(read_shard(path))


def test_shards_that_are_damaged_or_not_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(InputError, match="pipe.tar is not a regular file"):
        list(read_shard(str(tmp_path / "pipe.tar")))
    files = [(f"{i}.{s}", c) for i in range(3) for s, c in (("png", picture()), ("cls", b"0"))]
    path = tmp_path / "a.tar"
    write_shard(path, files)
    content = bytearray(path.read_bytes())
    start = content.index(b"1.png")
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.tar cannot be read; .*damaged header at byte"):
        list(read_shard(str(path)))


def test_sparse_images_are_not_expanded(tmp_path):
    member = tarfile.TarInfo("0.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"%011o\0" % (7 * 2**30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    label = tarfile.TarInfo("0.cls")
    label.size = 1
    (tmp_path / "a.tar").write_bytes(bytes(header) + label.tobuf() + b"0" + bytes(511 + 1024))
    (problem,) = samples_of(str(tmp_path / "a.tar"))
    assert "0 has an image that is sparse or larger than 1 GiB" in problem


@pytest.mark.parametrize("name", ["s [1]", "s {a}", "s {a,b}", "s*", "{split}"])
def test_existing_folders_are_not_patterns(shards, tmp_path, name):
    for path in shards.glob("*.tar"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / path.name).write_bytes(path.read_bytes())
    assert len(open_split(f"webdataset:{tmp_path / name}", "val").images) == sum(SIZES["val"])
    if name != "{split}":
        spec = f"webdataset:{tmp_path / name}/{{split}}-{{000..001}}.tar"
        assert len(open_split(spec, "val").images) == sum(SIZES["val"])


@pytest.mark.parametrize("length", [-3, 9.5, "9", True, None, 10**4, 10**30])
def test_invalid_lengths_are_reported(shards, tmp_path, length):
    (tmp_path / "train-000.tar").write_bytes((shards / "train-000.tar").read_bytes())
    lengths = {"train": {"filenames": ["train-000.tar"], "shard_lengths": [length]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": lengths}))
    with pytest.raises(
        InputError, match="_info.json has the length .* for train-000.tar, expected a"
    ):
        open_split(f"webdataset:{tmp_path}", "train", num_classes=4)


def test_a_shard_without_samples_does_not_end_a_run(shards, tmp_path):
    (tmp_path / "train-000.tar").write_bytes((shards / "train-000.tar").read_bytes())
    (tmp_path / "train-001.tar").write_bytes((shards / "train-001.tar").read_bytes())
    write_shard(tmp_path / "train-002.tar", [])
    assert len(batches_of(tmp_path, World(0, 1, torch.device("cpu")), workers=3)) == 5
