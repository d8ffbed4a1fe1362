"""A run only resumes with its own states and its own data, which may move."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from t2tvit.cli import main
from t2tvit.data import open_split
from t2tvit.training.checkpointing.states import read_state, write_state
from tests.support.training.tiny import TINY, metrics_of, newest

LITTLE = ("--batch-size", "4", "--num-classes", "2")


def train(output, *options) -> int:
    return main(["train", *TINY, "--output", str(output), *options])


def refused(capsys, *options) -> str:
    """The one-line error of a refused run."""
    capsys.readouterr()
    assert main(["train", *options]) == 2
    line = capsys.readouterr().err
    assert line.startswith("t2tvit: error: ") and line.count("\n") == 1, line
    return line


def picture(number) -> bytes:
    """A PNG file of a different size for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24 + number, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def make_folder(root):
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(4):
                (place / f"{number}.png").write_bytes(picture(10 * label + number))
    return root


def make_shards(root):
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("ant\nbee\n")
    for split in ("train", "val"):
        for number in range(2):
            write_shard(root / f"{split}-{number}.tar", range(4 * number, 4 * number + 4))
    return root


def write_shard(path, numbers):
    with tarfile.open(path, "w") as shard:
        for number in numbers:
            for suffix, content in (("png", picture(number)), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


MADE = {"imagefolder": make_folder, "webdataset": make_shards}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each source, a folder of images and a run of one epoch on it."""
    found = {}
    for source, make in MADE.items():
        if source == "webdataset":
            pytest.importorskip("webdataset")
        place = tmp_path_factory.mktemp(source)
        data, output = make(place / "data"), place / "run"
        assert train(output, "--data", f"{source}:{data}", *LITTLE, "--epochs", "1") == 0
        found[source] = data, output
    return found


@pytest.fixture
def copied(runs, tmp_path):
    """A function that copies the data and the run of a source to other folders."""

    def copy(source):
        data, output = tmp_path / "moved" / "data", tmp_path / "run"
        shutil.copytree(runs[source][0], data)
        shutil.copytree(runs[source][1], output)
        options = ("--data", f"{source}:{data}", "--resume", "auto", "--epochs", "2")
        return data, output, ("--output", str(output), *options)

    return copy


def add(root):
    (root / "train" / "bee" / "more.png").write_bytes(picture(30))


def remove_held_out(root):
    (root / "val" / "ant" / "2.png").unlink()


def rename(root):
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "zero.png")


def replace_file(root):
    (root / "val" / "ant" / "0.png").write_bytes(picture(31))


def move_to_another_class(root):
    for one, other in (("ant", "bee"), ("bee", "ant")):
        (root / "train" / one / "1.png").rename(root / "train" / other / "9.png")


def rename_class(root):
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "cat")


def add_class(root):
    for split in ("train", "val"):
        shutil.copytree(root / split / "bee", root / split / "cat")


def other_shard(root):
    write_shard(root / "train-1.tar", range(14, 18))


def fewer_shards(root):
    (root / "train-1.tar").unlink()


def renamed_shard(root):
    (root / "train-1.tar").rename(root / "train-2.tar")


def other_label(root):
    path = root / "train-0.tar"
    content = path.read_bytes()
    with tarfile.open(path) as shard:
        place = shard.getmember("1.cls").offset_data
    path.write_bytes(content[:place] + b"0" + content[place + 1 :])


def other_mapping(root):
    (root / "classes.txt").write_text("bee\nant\n")


CHANGES = [
    ("imagefolder", add, "number of training images: got 9, but the run to resume has 8"),
    ("imagefolder", remove_held_out, "number of held-out images: got 7, but"),
    ("imagefolder", rename, "digest of names, sizes and labels of the training images: got"),
    ("imagefolder", replace_file, "digest of names, sizes and labels of the held-out images"),
    ("imagefolder", move_to_another_class, "of the training images: got"),
    ("imagefolder", rename_class, "classes: got 'cat' as class 1, but the run to resume has 'bee'"),
    ("imagefolder", add_class, "classes: got 3 classes, but the run to resume has 2"),
    ("webdataset", other_shard, "digest of names, sizes and labels of the training images"),
    ("webdataset", fewer_shards, "number of training images: got 4, but"),
    ("webdataset", renamed_shard, "digest of names, sizes and labels of the training images"),
    ("webdataset", other_label, "digest of names, sizes and labels of the training images"),
    ("webdataset", other_mapping, "classes: got 'bee' as class 0, but the run to resume has 'ant'"),
]


@pytest.mark.parametrize(
    "source, change, words", CHANGES, ids=[change.__name__ for _, change, _ in CHANGES]
)
def test_changed_data_is_refused(copied, tmp_path, capsys, source, change, words):
    data, output, options = copied(source)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    change(data)
    line = refused(capsys, *options)
    assert words in line and f"--init {output / 'last.safetensors'}" in line
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    # Nor in another folder.
    assert words in refused(
        capsys, "--resume", str(output), "--output", str(tmp_path / "new"), *options[2:4]
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", MADE)
def test_data_may_move(copied, source):
    _, output, options = copied(source)
    assert main(["train", *options, "--workers", "1"]) == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2]


def test_another_number_of_synthetic_images_is_refused(tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--epochs", "1") == 0
    resume = ("--output", str(output), "--resume", "auto", "--epochs", "2")
    line = refused(capsys, *resume, "--data", "synthetic:48")
    assert "number of training images: got 48, but the run to resume has 44" in line


def test_digests_depend_on_the_labels(tmp_path):
    """Also for arrays and timm's datasets."""
    digits, others = (open_split(spec, "train").images for spec in ("digits:01", "digits:02"))
    assert digits.digest() != others.digest()
    assert digits.digest() == open_split("digits:10", "train").images.digest()
    one, other = make_folder(tmp_path / "one"), make_folder(tmp_path / "other")
    digests = [
        open_split(f"timm:torch/image_folder:{root}", "train").images.digest()
        for root in (one, other)
    ]
    assert digests[0] == digests[1]
    rename(other)
    changed = open_split(f"timm:torch/image_folder:{other}", "train")
    assert changed.images.digest() != digests[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train(output, "--epochs", "2") == 0
    return output


@pytest.mark.parametrize(
    "options, words",
    [
        (("--seed", "1"), "seed: got 1, but run.json in its folder has 0"),
        (("--data", "synthetic:40"), "number of training images: got 40"),
        (("--model-args", "embed_dim=32", "depth=1", "num_heads=2"), "model_args: got"),
        (("--data", "digits:012", "--num-classes", "none"), "data: got digits:012, but"),
        (("--lr", "2e-3", "--optimizer", "sgd"), "optimizer: got sgd"),
    ],
    ids=["seed", "images", "model", "source", "optimizer"],
)
def test_the_state_of_another_run_is_refused(tmp_path, finished, capsys, options, words):
    output, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, output)
    assert train(other, "--epochs", "3", *options) == 0
    shutil.copy(newest(other), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    line = refused(capsys, "--output", str(output), "--resume", "auto")
    assert f"{output / newest(other).name} is the state of another run: {words}" in line
    assert words in refused(capsys, "--resume", str(output), "--output", str(tmp_path / "new"))
    assert words in refused(capsys, "--resume", str(output / newest(other).name))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert not (tmp_path / "new").exists()
    (output / newest(other).name).unlink()
    assert main(["train", "--output", str(output), "--resume", "auto", "--epochs", "3"]) == 0


def test_states_and_records_of_the_earlier_format_resume(tmp_path, finished):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for path in output.glob("state-*"):
        state = read_state(path)
        del state["images"]
        write_state(path, state)
    record = json.loads((output / "run.json").read_text())
    del record["identity"]
    (output / "run.json").write_text(json.dumps(record))
    assert main(["train", "--output", str(output), "--resume", "auto", "--epochs", "3"]) == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3]
    assert "images" in read_state(newest(output))
    assert "identity" in json.loads((output / "run.json").read_text())


def test_a_changed_identity_in_the_record_gives_no_traceback(tmp_path, finished, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    record = json.loads((output / "run.json").read_text())
    for wrong in (3, {}, {"config": {}, "class_names": [], "images": {"train": 1, "val": {}}}):
        (output / "run.json").write_text(json.dumps(record | {"identity": wrong}))
        assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
        assert "run.json is not the record of a run" in capsys.readouterr().out
