"""Tar shards: who reads what, exact resume, damage."""

import io
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
from t2tvit.errors import InputError
from t2tvit.training import run
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.pipeline import begin_epoch, eval_loader, open_data, train_loader
from tests.training.compare import assert_equal, without_times
from tests.training.tiny import TINY, metrics_of, state_of

pytest.importorskip("webdataset")
SIZES = {"train": (9, 12, 7, 10, 6), "val": (5, 6)}
CONFIG = RunConfig(img_size=24, num_classes=4, workers=0, batch_size=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """train-NNN.tar and val-NNN.tar of various lengths; image i of a shard has the colour i."""
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
    """The batches of the first epoch from ``step`` on, each as places and pixels."""
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
def test_an_epoch_goes_on_from_any_batch(shards, workers):
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


def test_an_interrupted_run_on_shards_ends_as_if_it_had_not_been(shards, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--data", f"webdataset:{shards}", "--epochs", "2", "--checkpoint-minutes", "0")
    assert main(["train", *TINY, *options, "--output", str(whole)]) == 0

    class Interrupted(run.Keeper):
        def after_step(self, state):
            super().after_step(state)
            if state.updates == 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "Keeper", Interrupted)
        assert main(["train", *TINY, *options, "--output", str(parts)]) == 130
    assert main(["train", "--output", str(parts), "--resume", "auto"]) == 0
    first, second = state_of(whole)["state"], state_of(parts)["state"]
    assert_equal(first["model"], second["model"])
    assert without_times(metrics_of(whole)) == without_times(metrics_of(parts))


def test_what_cannot_be_read_is_named_and_the_next_stands_for_it(shards, tmp_path):
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
        open_data(config, World(0, 1, torch.device("cpu")))
    split = open_split(f"webdataset:{tmp_path}", "train", num_classes=4)
    loader = train_loader(split, CONFIG, World(0, 1, torch.device("cpu")))
    problems = {problem for batch in loader for problem in batch.problem if problem}
    assert any("train-001.tar cannot be read" in problem for problem in problems)
    assert any("train-002.tar/train2/0000 cannot be read" in problem for problem in problems)
    assert len(problems) == 2


@pytest.mark.parametrize("label", [b"cat", None])
def test_a_sample_without_a_number_costs_no_other(shards, tmp_path, label):
    with tarfile.open(shards / "train-000.tar") as old, tarfile.open(tmp_path / "a.tar", "w") as new:
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


def test_shards_that_are_not_there_are_said(shards, tmp_path):
    for spec, message in (
        (tmp_path, "has no shards for train"),
        (tmp_path / "train-{000..004}.tar", "is no folder; give one, or names of shards"),
        (shards / "{split}-{000..009}.tar", "train-005.tar does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            open_split(f"webdataset:{spec}", "train", num_classes=4)
    split = open_split(f"webdataset:{shards / '{split}-{000..001}.tar'}", "val")
    assert (len(split.images), split.class_names) == (11, ["0", "1", "2", "3"])
