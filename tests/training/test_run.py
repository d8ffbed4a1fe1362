"""A whole run: its files, resuming, and errors."""

import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import t2tvit
from t2tvit.cli import main
from t2tvit.errors import RunError
from t2tvit.files import write_atomically
from t2tvit.training import environment, log, progress
from t2tvit.training.checkpointing import Checkpointer, read_about, run_folder, tensors, weights
from t2tvit.training.checkpointing.states import read_state, write_state
from t2tvit.training.config import RunConfig, resolve
from t2tvit.training.distributed import World
from t2tvit.training.pipeline import open_data, open_splits
from t2tvit.training.randomness import rng_state, set_rng_state
from t2tvit.training.stopping import Signals
from t2tvit.training.trainer import Trainer
from tests.support.training.equality import assert_equal, without_times
from tests.support.training.tiny import HELD_OUT, TINY, metrics_of, newest, state_of


def train(output, *options) -> int:
    return main(["train", *TINY, "--output", str(output), *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train(output, "--epochs", "3") == 0
    return output


def test_a_run_writes_the_documented_files_only(finished):
    files = {"best.safetensors", "last.safetensors", "config.yaml", "run.json"}
    files |= {"state-00002-00000000.safetensors", "state-00003-00000000.safetensors"}
    files |= {"metrics.jsonl", "curves.png"}
    assert {path.name for path in finished.iterdir()} == files
    assert [path.name for path in finished.parent.iterdir()] == ["run"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_one_object_per_epoch(finished):
    metrics = metrics_of(finished)
    assert [row["epoch"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert {"train_loss", "eval_loss", "top1", "top5", "images_per_second", "lr"} <= row.keys()
        assert row["eval_images"] == HELD_OUT
        assert 0 <= row["top1"] <= row["top5"] <= 100
        assert row["loader_images_per_second"] > 0 and 0 < row["loader_wait"] < 1
    assert metrics[-1]["lr"] < metrics[0]["lr"] <= 1e-3


def test_a_run_records_its_starts(finished):
    config = resolve(finished / "config.yaml", {})
    assert (config.model, config.lr, config.epochs) == ("t2t_vit_7", 1e-3, 3)
    record = json.loads((finished / "run.json").read_text())
    assert record["class_names"] == ["0", "1", "2", "3", "4", "5"]
    (start,) = record["starts"]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert start["world_size"] == 1
    assert start["command"] and start["git_commit"] == environment.git_commit()


def test_the_commit_is_the_source_s(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
        command = ("git", *identity, "-C", str(tmp_path), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(environment, "SOURCE", tmp_path)
    (tmp_path / "__init__.py").write_text("")
    assert environment.git_commit() is None
    git("init", "--quiet")
    assert environment.git_commit() is None  # somebody's checkout that does not track the package
    git("add", "."), git("commit", "--quiet", "--message", "first")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "__init__.py").write_text("changed = True")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_the_saved_weights_are_the_averaged_ones(finished):
    about = read_about(finished / "last.safetensors")
    model = t2tvit.create_model(about.model, **about.create_args)
    report = t2tvit.load_checkpoint(model, finished / "last.safetensors")
    assert report.loaded == len(model.state_dict())
    state = state_of(finished)["state"]
    assert_equal(dict(model.state_dict()), dict(state["ema"]))
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


def test_the_best_weights_are_those_of_the_best_epoch(finished):
    best = max(metrics_of(finished), key=lambda row: (row["top1"], row["epoch"]))
    about = read_about(finished / "best.safetensors")
    assert (about.epoch, about.top1) == (best["epoch"], best["top1"])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="float32"),
        pytest.param(
            ("--amp", "bfloat16", "--workers", "1", "--optimizer", "sgd"), id="bf16-worker"
        ),
        pytest.param(
            ("--amp", "float16", "--clip-grad", "1", "--ema-decay", "none"), id="fp16-clip"
        ),
    ],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch, capsys, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--epochs", "3", *options) == 0

    one_epoch = Trainer.one_epoch

    def interrupted(trainer):
        if trainer.epochs_done == 2:
            raise KeyboardInterrupt
        return one_epoch(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_epoch", interrupted)
        assert train(parts, "--epochs", "3", *options) == 130
    assert f"t2tvit train --output {parts} --resume auto" in capsys.readouterr().out
    assert state_of(parts)["state"]["epochs_done"] == 2
    assert main(["train", "--output", str(parts), "--resume", "auto"]) == 0

    first, second = state_of(whole), state_of(parts)
    for content in (first, second):
        content["state"]["history"] = without_times(content["state"]["history"])
    assert_equal(first, second)
    assert (whole / "last.safetensors").read_bytes() == (parts / "last.safetensors").read_bytes()
    assert without_times(metrics_of(whole)) == without_times(metrics_of(parts))
    assert len(json.loads((parts / "run.json").read_text())["starts"]) == 2


def test_other_seeds_give_other_weights(tmp_path, finished):
    assert train(tmp_path / "run", "--epochs", "3", "--seed", "1") == 0
    weight = [
        state_of(path)["state"]["model"]["head.weight"] for path in (finished, tmp_path / "run")
    ]
    assert not torch.equal(*weight)


def test_resume_auto_starts_a_new_run_and_ends_a_finished_one(tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--epochs", "2", "--resume", "auto") == 0
    before = (output / "last.safetensors").read_bytes()
    assert train(output, "--epochs", "2", "--resume", "auto") == 0
    assert "finished 2 epochs" in capsys.readouterr().out
    assert (output / "last.safetensors").read_bytes() == before
    assert train(output, "--epochs", "3", "--resume", "auto") == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3]


def test_a_run_interrupted_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    output = tmp_path / "run"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_epoch", interrupted)
        assert train(output, "--epochs", "2") == 130
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    assert resolve(output / "config.yaml", {}).data == "synthetic:44"
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2]


def test_a_run_can_resume_in_another_folder(tmp_path, finished, capsys):
    before = newest(finished).read_bytes()
    output = tmp_path / "longer"
    options = ["--resume", str(finished), "--epochs", "4", "--output", str(output)]
    assert main(["train", *options]) == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3, 4]
    assert newest(finished).read_bytes() == before
    assert (
        "epochs    4 instead of 3: the cosine schedule changes from here" in capsys.readouterr().out
    )
    best = max(metrics_of(output), key=lambda row: (row["top1"], row["epoch"]))
    assert read_about(output / "best.safetensors").epoch == best["epoch"]


def test_a_finished_run_moves_to_another_folder_completely(tmp_path, finished, capsys):
    output = tmp_path / "moved"
    assert main(["train", "--resume", str(finished), "--output", str(output)]) == 0
    missing = {path.name for path in finished.iterdir()} - {path.name for path in output.iterdir()}
    assert missing == {"state-00002-00000000.safetensors"}
    for name in ("best.safetensors", "last.safetensors", newest(finished).name):
        assert (output / name).read_bytes() == (finished / name).read_bytes()
    best = max(metrics_of(output), key=lambda row: (row["top1"], row["epoch"]))["epoch"]
    (output / "best.safetensors").unlink()
    third = tmp_path / "third"
    capsys.readouterr()
    assert main(["train", "--resume", str(output), "--output", str(third)]) == 0
    assert read_about(third / "best.safetensors").epoch == 3
    lost = f"weights   best.safetensors: epoch 3; those of epoch {best} are lost"
    assert (lost in capsys.readouterr().out) == (best != 3)


def refused(capsys, *options) -> str:
    """The one-line error of a refused run."""
    capsys.readouterr()
    assert main(["train", *options]) == 2
    line = capsys.readouterr().err
    assert line.startswith("t2tvit: error: ") and line.count("\n") == 1, line
    return line


def test_a_second_run_does_not_mix_with_the_first(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    line = refused(capsys, *TINY, "--output", str(finished), "--epochs", "3")
    assert "is not empty" in line and "--resume auto" in line
    line = refused(capsys, "--output", str(finished), "--resume", "auto", "--lr", "0.5")
    assert "lr: got 0.5, but the run to resume has 0.001" in line
    line = refused(capsys, "--output", str(finished), "--resume", "auto", "--momentum", "0.5")
    assert "momentum: got 0.5, but the run to resume has 0.9; do not change it" in line
    line = refused(capsys, "--output", str(finished), "--resume", "auto", "--epochs", "2")
    assert "epochs: got 2, including cool-down, but the run to resume has done 3" in line
    line = refused(capsys, "--output", str(finished), "--resume", "auto", "--data", "digits")
    assert "data: got digits, but the run to resume has synthetic:44" in line
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_outputs_that_cannot_be_used(tmp_path, finished, capsys):
    assert "--output: got none" in refused(capsys, *TINY)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for resume in ("auto", str(finished)):
        line = refused(capsys, *TINY, "--epochs", "3", "--output", str(foreign), "--resume", resume)
        assert "does not hold the run to resume" in line
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    below_a_file = foreign / "thesis.txt" / "run"
    assert "choose another folder" in refused(
        capsys, *TINY, "--epochs", "3", "--output", str(below_a_file)
    )


def test_states_that_cannot_be_resumed(tmp_path, finished, capsys):
    assert "does not exist" in refused(capsys, "--resume", str(tmp_path / "gone"))
    state = tmp_path / "state.safetensors"
    state.write_bytes(newest(finished).read_bytes()[:5000])
    assert "is damaged" in refused(capsys, "--resume", str(state))
    weights = str(finished / "last.safetensors")
    assert "is not a training state" in refused(capsys, "--resume", weights)


def without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def put(value, *path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def of_first_moment(content):
    moments = next(iter(content["state"]["optimizer"]["state"].values()))
    moments["exp_avg"] = torch.zeros(7)


def of_a_weight(content):
    content["state"]["model"]["head.weight"] = torch.zeros(2, 2)


WRONG_STATES = {
    "no-config": (without("config"), "content has no config"),
    "no-model": (without("state", "model"), "state has no model"),
    "no-moments": (without("state", "optimizer", "param_groups"), "optimizer has no param_groups"),
    "no-weight": (without("state", "model", "head.bias"), "does not fit the run: .*head.bias"),
    "another-weight": (put(torch.ones(1), "state", "model", "x"), "does not fit the run: .*x"),
    "shape-of-a-weight": (of_a_weight, "does not fit the run: .*head.weight"),
    "shape-of-a-moment": (of_first_moment, r"exp_avg has the shape \(7,\), expected"),
    "text-for-a-weight": (put("a", "state", "model", "head.bias"), "model is dict"),
    "text-for-a-count": (put("3", "state", "updates"), "updates is str '3'"),
    "negative-count": (put(-1, "state", "step"), "step is int -1"),
    "huge-count": (put(10**30, "state", "epochs_done"), "epochs_done is int 1000"),
    "beyond-the-epoch": (put(10**6, "state", "step"), "it is at update 1000000, an epoch has 5"),
    "history-of-text": (put(["a", "b", "c"], "state", "history"), "history is str 'a'"),
    "short-history": (put([], "state", "history"), "history does not have one entry per epoch"),
    "null-history": (put(None, "state", "history"), "history is NoneType"),
    "ranks": (put([], "ranks"), "ranks is empty"),
    "rank-of-text": (put(["a"], "ranks"), "ranks is str 'a'"),
    "generators": (put({}, "ranks", 0, "rng"), "does not fit the run: 'python'"),
    "generator-of-text": (put("x", "ranks", 0, "rng", "python"), "does not fit the run: "),
    "config-of-text": (put("a", "config"), "config is str 'a'"),
    "classes": (put([1, 2], "class_names"), "class_names is int 1"),
    "rate-of-text": (
        put("fast", "state", "optimizer", "param_groups", 0, "lr"),
        "lr of the optimiser is 'fast'",
    ),
    "groups": (put([], "state", "optimizer", "param_groups"), "does not fit the run: "),
    "list": (lambda content: content.clear(), "content has no state"),
}


@pytest.mark.parametrize("change, message", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_state_with_other_content_is_a_one_line_error(
    tmp_path, finished, capsys, change, message
):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    path = newest(output)
    for other in set(output.glob("state-*")) - {path}:
        other.unlink()
    content = read_state(path)
    change(content)
    write_state(path, content)
    line = refused(capsys, "--output", str(output), "--resume", "auto", "--epochs", "4")
    assert re.search(message, line) and str(path) in line and len(line) < 600


def test_training_starts_from_given_weights(tmp_path, finished):
    weights = finished / "best.safetensors"
    output = tmp_path / "run"
    options = ("--initial-checkpoint", str(weights), "--lr", "0", "--min-lr", "0")
    assert train(output, "--epochs", "2", "--warmup-lr", "0", *options) == 0
    assert_equal(
        dict(state_of(output)["state"]["model"]),
        dict(t2t_weights(weights)),
    )


def t2t_weights(path):
    about = read_about(path)
    model = t2tvit.create_model(about.model, **about.create_args)
    t2tvit.load_checkpoint(model, path)
    return model.state_dict()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    one_epoch = Trainer.one_epoch

    def poisoned(trainer):
        if trainer.epochs_done == 1:
            with torch.no_grad():
                trainer.model.head.bias[0] = torch.nan
        return one_epoch(trainer)

    monkeypatch.setattr(Trainer, "one_epoch", poisoned)
    assert train(output, "--epochs", "3") == 1
    line = capsys.readouterr().err
    assert "the loss is not finite at step 5 of epoch 2" in line and line.count("\n") == 1
    assert "the last checkpoint is intact" in line
    state = state_of(output)["state"]
    assert state["epochs_done"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())

    kept = read_state(output / "not_finite-0.safetensors")
    about = read_about(output / "last.safetensors")
    model = t2tvit.create_model(about.model, **about.create_args)
    model.load_state_dict(kept["model"])
    set_rng_state(kept["rng"])
    assert not model.train()(kept["images"]).isfinite().all()
    assert kept["targets"].shape == (8, 6) and len(kept["names"]) == 8


@pytest.fixture
def folder(tmp_path):
    """An image folder with three training images that are cut short."""
    random = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("ant", "bee")):
        place = tmp_path / "images" / split / name
        place.mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.jpg")
            if split == "train" and name == "bee" and number < 3:
                path = place / f"{number}.jpg"
                path.write_bytes(path.read_bytes()[:300])
    return tmp_path / "images"


def test_unreadable_images_are_named_counted_and_skipped_up_to_a_limit(tmp_path, folder, capsys):
    options = ("--data", f"imagefolder:{folder}", "--num-classes", "2", "--epochs", "3")
    assert train(tmp_path / "run", *options, "--max-unreadable", "3") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 3  # each once, not once in each epoch
    for number in range(3):
        path = folder / "train" / "bee" / f"{number}.jpg"
        assert sum(f"image {path} cannot be read" in line for line in warnings) == 1
    assert [row["unreadable_images"] for row in metrics_of(tmp_path / "run")] == [3, 3, 3]
    assert train(tmp_path / "second", *options, "--max-unreadable", "2") == 2
    line = capsys.readouterr().err
    assert "3 training images cannot be read, the last: image" in line and line.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_without_write_permission_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    line = refused(capsys, *TINY, "--epochs", "3", "--output", str(tmp_path / "run"))
    assert "Permission denied" in line


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of the size of files")
def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, finished):
    """The limit on file sizes is that of the weights, so the larger training state fails."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = {path: path.read_bytes() for path in output.glob("state-*")}
    limit = (output / "last.safetensors").stat().st_size + 1000
    assert all(limit < len(content) for content in before.values())
    code = (
        "import resource, sys; from t2tvit.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        f"sys.exit(main(['train', '--output', {str(output)!r}, '--resume', 'auto',"
        " '--epochs', '4']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    line = f"t2tvit: error: cannot write {output}/state-00003-00000005.safetensors: "
    assert done.stderr == line + "File too large\n"
    assert {path: path.read_bytes() for path in output.glob("state-*")} == before
    assert not list(output.glob(".*"))


def test_it_learns_digits(tmp_path, capsys):
    options = ["--epochs", "3", "--warmup-epochs", "1", "--device", "cpu"]
    assert main(["train", "--output", str(tmp_path / "run"), *options]) == 0
    assert metrics_of(tmp_path / "run")[-1]["top1"] > 75
    first = capsys.readouterr().out.splitlines()[:12]
    log = "\n".join(first)
    for word in ("world size 1", "global batch 64", "lr 0.001", "t2t_vit_7", "performer_layer"):
        assert word in log


def test_a_compiled_run_trains_the_same_model(tmp_path, monkeypatch, finished):
    """With our kernels, training and evaluation are one graph each; no code is generated."""
    compile_module, calls = torch.nn.Module.compile, []

    def traced(self, *, mode, **options):
        calls.append((mode, options))
        compile_module(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    output = tmp_path / "run"
    assert train(output, "--epochs", "3", "--compile", "--fused-kernels", "cpu") == 0
    assert calls == 2 * [("default", {"fullgraph": True, "dynamic": False})]  # with the average
    for one, other in zip(metrics_of(finished), metrics_of(output), strict=True):
        assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-2)
    names = [state_of(path)["state"]["model"].keys() for path in (finished, output)]
    assert names[0] == names[1]


def test_a_profile_is_a_trace_and_a_summary_for_one_screen(tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output, "--epochs", "2", "--fused-kernels", "cpu", "--profile", "2") == 0
    summary = (output / "profile.txt").read_text()
    assert summary in capsys.readouterr().out and len(summary.splitlines()) < 20
    assert "profile   2 updates, " in summary and "t2t_cpu::performer_layer_backward" in summary
    with gzip.open(output / "profile.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("forward") == names.count("optimiser") == 2
    assert train(tmp_path / "short", "--epochs", "2", "--profile", "6") == 0
    assert "no profile: it needs 11 updates, 1 more than the run made" in capsys.readouterr().out
    assert not (tmp_path / "short" / "profile.txt").exists()


def test_an_error_while_profiling_leaves_no_profiler_running(tmp_path, monkeypatch, capsys):
    def update(self):
        if self.updates == 7:
            assert torch.autograd._profiler_enabled()
            raise RunError("planted")
        return original(self)

    original = Trainer.update
    monkeypatch.setattr(Trainer, "update", update)
    output = tmp_path / "run"
    assert train(output, "--epochs", "2", "--profile", "6") == 1
    assert not torch.autograd._profiler_enabled()
    assert "planted" in (said := capsys.readouterr()).err and "profile" not in said.out
    assert not (output / "profile.txt").exists()


def test_the_loader_line_has_a_hint_if_the_loader_is_the_bottleneck():
    metrics = {"loader_images_per_second": 1234.0, "loader_wait": 0.19}
    line = log.loader_line(metrics, 3)
    assert line.startswith("loader    3 workers per process can deliver 1,234 images/s")
    assert "19% of the time" in line and "bottleneck" not in line
    assert "raise --workers" in log.loader_line(metrics | {"loader_wait": 0.21}, 3)


def test_metrics_reach_tensorboard_once_and_the_end_lists_the_files(tmp_path, capsys):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    assert train(output, "--epochs", "2", "--tensorboard") == 0
    options = ("--resume", "auto", "--epochs", "3", "--output", str(output))
    assert main(["train", *options]) == 0
    board = events.EventAccumulator(str(output / "tensorboard")).Reload()
    metrics = metrics_of(output)
    for name in ("train_loss", "top1", "loader_wait"):
        written = board.Scalars(name)
        assert [event.step for event in written] == [1, 2, 3]
        assert [event.value for event in written] == pytest.approx([row[name] for row in metrics])
    out = capsys.readouterr().out
    assert re.search(r"epoch 1/2 .* MiB  0:\d\d:\d\d left", out)
    end = out[out.rindex("finished 3 epochs in ") :]
    for path in output.iterdir():
        assert f"{path} " in end or path.name == "state-00002-00000000.safetensors"


def test_metrics_reach_wandb_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(tmp_path / "run", "--epochs", "2", "--wandb", "tests") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    option = ("--tensorboard",) if package == "tensorboard" else ("--wandb", "tests")
    output = ("--output", str(tmp_path / "run"))
    line = refused(capsys, *TINY, "--epochs", "2", *output, *option)
    assert f"{package}: not installed; pip install {package}" in line
    assert not (tmp_path / "run").exists()


DAMAGED_RECORDS = {
    "empty": b"",
    "cut": b'{"class_names": ["0"], "sta',
    "foreign": b'{"name": "another tool"}',
    "list": b"[1, 2]",
    "starts-of-another-kind": b'{"starts": 3}',
    "binary": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "beginning-without-state": b'{"starts": [], "beginning": {"config": {}}}',
    "beginning-of-text": b'{"starts": [], "beginning": "a"}',
    "classes-of-numbers": b'{"starts": [], "identity": {"config": {}, "class_names": [1], "images": {}}}',
    "images-of-text": b'{"starts": [], "identity": {"config": {}, "class_names": [], "images": '
    b'{"train": {"images": "a", "digest": 3}, "val": {"images": 1, "digest": "a"}}}}',
}


@pytest.mark.parametrize("content", DAMAGED_RECORDS.values(), ids=DAMAGED_RECORDS)
def test_a_damaged_record_is_set_aside_and_the_run_resumes(tmp_path, finished, capsys, content):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "run.json").write_bytes(content)
    assert main(["train", "--output", str(output), "--resume", "auto", "--epochs", "4"]) == 0
    assert f"{output}/run.json is not the record of a run" in capsys.readouterr().out
    assert (output / "run.json.set-aside").read_bytes() == content
    (start,) = json.loads((output / "run.json").read_text())["starts"]
    assert start["epochs_done"] == 3
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3, 4]


def test_a_state_suffices_to_resume(tmp_path, finished):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(newest(finished), output)
    assert main(["train", "--output", str(output), "--resume", "auto", "--epochs", "4"]) == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3, 4]


@pytest.mark.parametrize("files", range(7))
@pytest.mark.parametrize("moves", [False, True], ids=["new", "moved"])
def test_a_start_that_is_killed_after_any_file_can_be_repeated(
    tmp_path, monkeypatch, finished, moves, files
):
    """As by SIGKILL while the next file is written: its temporary file remains."""
    output, written = tmp_path / "run", []

    def killed(path, content):
        if len(written) == files:
            path.with_name(f".{path.name}.writing").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        write_atomically(path, content)

    options = ("--resume", str(finished)) if moves else TINY
    options = (*options, "--epochs", "4", "--output", str(output))
    with monkeypatch.context() as patch:
        for module in (run_folder, tensors, weights):
            patch.setattr(module, "write_atomically", killed)
        status = main(["train", *options])
    if status == 0:
        pytest.skip("a start writes fewer files")
    assert main(["train", *options, *(() if moves else ("--resume", "auto"))]) == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3, 4]


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("moves", [False, True], ids=["new", "moved"])
def test_a_killed_start_is_repeated_without_its_options(
    tmp_path, monkeypatch, finished, moves, files
):
    output, written = tmp_path / "run", []

    def killed(path, content):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(path)
        write_atomically(path, content)

    options = ("--resume", str(finished)) if moves else TINY
    with monkeypatch.context() as patch:
        for module in (run_folder, tensors, weights):
            patch.setattr(module, "write_atomically", killed)
        assert main(["train", *options, "--epochs", "4", "--output", str(output)]) == 130
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    assert resolve(output / "config.yaml", {}).data == "synthetic:44"
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3, 4]


def test_an_excess_state_is_removed_when_the_run_resumes(tmp_path, finished):
    """The run was killed between writing a state and removing the oldest."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.copy(newest(output), output / "state-00001-00000000.safetensors")
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    names = {path.name for path in output.glob("state-*")}
    assert names == {path.name for path in finished.glob("state-*")}


@pytest.mark.parametrize(
    "options, words",
    [
        (("--model", "timm:resnet18", "--model-args", "num_classes=6"), "model_args"),
        (("--batch-size", "1", "--model", "timm:resnet18"), "raise --batch-size"),
        (
            ("--batch-size", "4", "--accumulate", "4", "--model", "timm:resnet18"),
            "lower --accumulate 4",
        ),
    ],
)
def test_batches_too_small_for_batch_norm_are_refused_before_anything_is_written(
    tmp_path, capsys, options, words
):
    of_t2t = ("--model-args", "embed_dim=32", "depth=2", "num_heads=2")
    ours = [each for each in TINY if each not in of_t2t]
    plain = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--img-size", "32")
    options = (*ours, *plain, "--epochs", "2", *options, "--output", str(tmp_path / "run"))
    assert words in refused(capsys, *options, "--fused-kernels", "auto")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_train_on_its_batch_is_a_one_line_error(tmp_path, monkeypatch, capsys):
    def forward(self, images):
        if self.training:
            raise ValueError("Expected more than 1 value per channel when training")
        return self.forward_head(self.forward_features(images))

    monkeypatch.setattr(t2tvit.models.T2TBackbone, "forward", forward)
    line = refused(capsys, *TINY, "--epochs", "2", "--output", str(tmp_path / "run"))
    assert "does not train on 8 images" in line and "change --batch-size" in line


def test_few_images_and_few_epochs_are_handled_and_logged(tmp_path, capsys):
    output = tmp_path / "run"
    options = ("--batch-size", "64", "--warmup-epochs", "10", "--epochs", "5")
    assert train(output, *options) == 0
    out = capsys.readouterr().out
    assert "batch     44 instead of 64: there are only 44 training images" in out
    assert "warm-up   1 instead of 10 epochs: the run has only 5" in out
    assert "5 epochs of 1 updates, global batch 44" in out
    assert train(output, *options[:-1], "6", "--resume", "auto") == 0
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2, 3, 4, 5, 6]


def test_the_packaged_configuration_for_own_images_trains(tmp_path, finished):
    """With the arguments and weights of the tiny model instead of the published ones."""
    weights = ("--init", str(finished / "best.safetensors"), "--config", "finetune/small")
    tiny = [value for value in TINY if value != "--batch-size"]
    tiny.remove("8")
    output = tmp_path / "run"
    assert main(["train", *weights, *tiny, "--epochs", "2", "--output", str(output)]) == 0
    assert resolve(output / "config.yaml", {}).layer_decay == 0.75


def test_a_long_run_estimates_its_time_early(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    forecast = progress.Forecast(3900, "100 epochs", 3, World(0, 1, torch.device("cpu")))
    for seconds in (60, 9, 2, 2, 2, 2):
        now[0] += seconds
        forecast.after_step()
    line = "time      about 2 h 10 min for 100 epochs, 6 h 30 min for 3 such runs (2 s per update)"
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    "seconds, text",
    [
        *((0.4, "0 s"), (59, "59 s"), (60, "1 min"), (125, "2 min 5 s")),
        *((7800, "2 h 10 min"), (90000, "1 d 1 h")),
    ],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_a_run_on_the_cpu_does_not_use_a_gpu(monkeypatch):
    """Both would open a context on a GPU that the run does not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(name))
    alone = World(0, 1, torch.device("cpu"))
    generators = rng_state(alone.device)
    assert generators["cuda"] is None
    set_rng_state(generators | {"cuda": torch.zeros(16, dtype=torch.uint8)}, alone.device)
    config = RunConfig(data="synthetic:44", img_size=16, workers=0, batch_size=8)
    data = open_data(config, alone, open_splits(config))
    assert not data.train.pin_memory and not data.held_out.pin_memory


def test_two_runs_do_not_share_an_output(tmp_path, monkeypatch, capsys, finished):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.3)
    with run_folder.locked(output):
        line = refused(capsys, "--output", str(output), "--resume", "auto", "--epochs", "4")
    assert "another run is writing there" in line
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert main(["train", "--output", str(output), "--resume", "auto", "--epochs", "4"]) == 0


def test_no_state_is_saved_for_time_alone_while_updates_are_skipped(tmp_path, monkeypatch):
    output, update = tmp_path / "run", Trainer.update

    def skipping(trainer):
        return trainer.updates not in (2, 3) and update(trainer)

    monkeypatch.setattr(Trainer, "update", skipping)
    options = ("--checkpoint-minutes", "0", "--keep-checkpoints", "99", "--epochs", "2")
    assert train(output, *options) == 0
    steps = [path.stem[-1] for path in sorted(output.glob("state-00000-*"))]
    assert steps == ["1", "2", "5"]


def test_a_skipped_update_leaves_the_statistics_of_batch_norm(tmp_path, monkeypatch):
    """Otherwise a non-finite batch would stay in the running mean forever."""
    of_t2t = ("--model-args", "embed_dim=32", "depth=2", "num_heads=2")
    ours = [each for each in TINY if each not in of_t2t]
    forward, calls = torch.nn.Conv2d.forward, []

    def poisoned(self, images):
        if self.in_channels == 3 and self.training:
            calls.append(None)
            if len(calls) == 2:
                images = images + torch.nan
        return forward(self, images)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", poisoned)
    options = (*ours, "--model", "timm:resnet10t", "--epochs", "2", "--drop-path", "0")
    options += ("--img-size", "32")
    output = ("--output", str(tmp_path / "run"), "--fused-kernels", "auto", "--ema-decay", "none")
    assert main(["train", *options, *output]) == 0
    assert metrics_of(tmp_path / "run")[0]["skipped_updates"] == 1
    state = state_of(tmp_path / "run")["state"]["model"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    "option, value, line",
    [
        ("--lr", "5e-4", "lr        0.0005 instead of 0.001"),
        ("--clip-grad", "1", "clip_grad 1.0 instead of None"),
        ("--amp", "float16", "amp       float16 instead of none"),
    ],
)
def test_remedies_for_divergence_change_only_on_the_command_line(
    tmp_path, finished, capsys, option, value, line
):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    resume = ("--output", str(output), "--resume", "auto")
    given = f"{option[2:].replace('-', '_')}: got "
    error = refused(capsys, *resume, option, value)
    assert error.startswith(f"t2tvit: error: {given}") and "no epochs left to train" in error
    assert main(["train", *resume, option, value, "--epochs", "4"]) == 0
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert main(["train", *resume, "--epochs", "5"]) == 0  # with what it has now
    assert "seed: got 1" in refused(capsys, *resume, "--seed", "1", "--epochs", "5")


def test_a_lower_rate_given_on_resuming_is_the_one_used(tmp_path, monkeypatch, finished):
    """Also if the run is killed before it saves a state, and resumed without it."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    resume = ("--output", str(output), "--resume", "auto")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", killed)
        assert main(["train", *resume, "--epochs", "4", "--lr", "5e-4"]) == 130
    assert main(["train", *resume]) == 0
    assert 0 < metrics_of(output)[-1]["lr"] <= 5e-4


def test_a_configuration_file_does_not_change_the_rate_of_a_run(tmp_path, finished, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    own = tmp_path / "own.yaml"
    own.write_text((output / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.5"))
    resume = ("--config", str(own), "--output", str(output), "--resume", "auto", "--epochs", "4")
    assert "give --lr 0.5 to change it" in refused(capsys, *resume)
    assert main(["train", *resume, "--lr", "0.5"]) == 0


def skipping(monkeypatch, *updates):
    """Skip these updates of the run, as if their gradients were not finite."""
    update = Trainer.update
    monkeypatch.setattr(
        Trainer, "update", lambda trainer: trainer.updates not in updates and update(trainer)
    )


def test_no_state_is_saved_after_an_epoch_that_ends_while_updates_are_skipped(
    tmp_path, monkeypatch, capsys
):
    """The next update that is not skipped saves one."""
    output = tmp_path / "run"
    skipping(monkeypatch, 3, 4, 5)
    assert train(output, "--epochs", "2", "--keep-checkpoints", "99") == 0
    assert "the last 2 updates were skipped" in capsys.readouterr().out
    names = [path.stem for path in sorted(output.glob("state-*"))]
    assert names == ["state-00001-00000002", "state-00002-00000000"]
    assert len(metrics_of(output)) == 2


@pytest.mark.parametrize("minutes", ["0", "10"])
def test_a_signal_while_updates_are_skipped_leaves_the_last_good_state(
    tmp_path, monkeypatch, capsys, minutes
):
    output = tmp_path / "run"
    options = ("--epochs", "2", "--keep-checkpoints", "99", "--checkpoint-minutes", minutes)
    with monkeypatch.context() as patch:
        skipping(patch, 7, 8)
        after_step = Checkpointer.after_step

        def signalled(self, trainer):
            if trainer.updates == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            after_step(self, trainer)

        patch.setattr(Checkpointer, "after_step", signalled)
        assert train(output, *options) == 0
    assert "stopped by a signal; the last good state is kept" in capsys.readouterr().out
    last = {"0": "state-00001-00000002", "10": "state-00001-00000000"}[minutes]
    assert newest(output).stem == last
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    assert state_of(output)["state"]["epochs_done"] == 2


def test_a_run_that_ends_while_updates_are_skipped_fails_and_keeps_the_last_good_state(
    tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    skipping(monkeypatch, 8, 9)
    assert train(output, "--epochs", "2") == 1
    line = capsys.readouterr().err
    assert "not finite in the last 2 updates" in line and line.count("\n") == 1
    assert newest(output).stem == "state-00001-00000000"


def test_a_too_large_loss_scale_at_the_end_is_not_a_failure(tmp_path, monkeypatch):
    skipping(monkeypatch, 9)
    assert train(tmp_path / "run", "--epochs", "2", "--amp", "float16") == 0


def overflowing(monkeypatch, *epochs):
    """Make the logits of one held-out image non-finite in these epochs."""
    evaluate, forward = Trainer.evaluate, t2tvit.models.T2TBackbone.forward
    evaluated = []

    def counted(trainer):
        evaluated.append(None)
        return evaluate(trainer)

    def overflows(self, images):
        logits = forward(self, images)
        if not self.training and len(evaluated) in epochs:
            logits[0, 0] = torch.nan
        return logits

    monkeypatch.setattr(Trainer, "evaluate", counted)
    monkeypatch.setattr(t2tvit.models.T2TBackbone, "forward", overflows)


def test_an_evaluation_that_is_not_finite_is_reported_and_never_the_best(
    tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    overflowing(monkeypatch, 1, 3)
    assert train(output, "--epochs", "4") == 0
    out = capsys.readouterr().out
    for epoch in (1, 3):
        assert f"warning   the held-out loss of epoch {epoch} is not finite" in out
    assert out.count("is not finite") == 2
    assert "NaN" not in (output / "metrics.jsonl").read_text()
    rows = metrics_of(output)
    assert [row["eval_loss"] is None for row in rows] == [True, False, True, False]
    best = max((rows[1], rows[3]), key=lambda row: (row["top1"], row["epoch"]))
    assert read_about(output / "best.safetensors").epoch == best["epoch"]


@pytest.mark.parametrize("epochs", [(3,), (1, 2, 3)])
def test_a_run_whose_last_evaluation_is_not_finite_fails(tmp_path, monkeypatch, capsys, epochs):
    output = tmp_path / "run"
    overflowing(monkeypatch, *epochs)
    assert train(output, "--epochs", "3") == 1
    line = capsys.readouterr().err
    assert "held-out loss of the last epoch is not finite" in line and line.count("\n") == 1
    assert (output / "best.safetensors").exists() == (len(epochs) < 3)
    moved = ("--resume", str(output), "--output", str(tmp_path / "moved"), "--epochs", "4")
    assert main(["train", *moved]) == 0  # the logits are finite again


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_signal_during_an_evaluation_stops_it_and_the_run_resumes_there(
    tmp_path, monkeypatch, capsys, finished, workers
):
    output, evaluate = tmp_path / "run", Trainer.evaluate

    def signalled(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", signalled)
        assert train(output, "--epochs", "3", "--workers", workers) == 0
    assert "stopped by a signal" in capsys.readouterr().out
    assert newest(output).name == "state-00000-00000005.safetensors"
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    first, second = state_of(finished)["state"], state_of(output)["state"]
    for name in ("model", "ema", "optimizer"):
        assert_equal(first[name], second[name])
    assert without_times(metrics_of(finished)) == without_times(metrics_of(output))


def test_an_ignored_hangup_stays_ignored():
    """Under nohup a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        with_handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert with_handler == signal.SIG_IGN
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("resume", [(), ("--resume", "auto")], ids=["new", "resumed"])
def test_a_run_that_waited_for_another_one_does_not_overwrite_it(
    tmp_path, monkeypatch, capsys, resume
):
    """Both start at the same time, and the other one ends before the first gives up."""
    output, locked = tmp_path / "run", run_folder.locked
    contents = []

    def late(place):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "locked", locked)
            assert train(output, "--epochs", "2") == 0
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
        return locked(place)

    monkeypatch.setattr(run_folder, "locked", late)
    line = refused(capsys, *TINY, "--output", str(output), "--epochs", "2", *resume)
    assert f"--output {output}" in line
    assert {path.name: path.read_bytes() for path in output.iterdir()} == contents[0]


@pytest.mark.parametrize("option", ["auto", "state"])
def test_a_resumed_run_that_waited_for_another_one_does_not_overwrite_it(
    tmp_path, monkeypatch, capsys, finished, option
):
    output, locked = tmp_path / "run", run_folder.locked
    shutil.copytree(finished, output)
    contents = []

    def late(place):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "locked", locked)
            resume = ("--output", str(output), "--resume", "auto", "--epochs", "4")
            assert main(["train", *resume]) == 0
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
        return locked(place)

    monkeypatch.setattr(run_folder, "locked", late)
    resume = option if option == "auto" else str(newest(output))
    options = ("--output", str(output), "--resume", resume, "--epochs", "5")
    assert "another run has just written there" in refused(capsys, *options)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == contents[0]


def test_of_two_processes_that_start_at_once_one_trains(tmp_path):
    """If it is killed, its lock ends with its loader processes."""
    output = tmp_path / "run"
    code = "import sys; from t2tvit.training.checkpointing import run_folder;"
    code += "run_folder.LOCK_PATIENCE = 0.3;"
    code += "from t2tvit.cli import main; sys.exit(main(sys.argv[1:]))"
    options = (*TINY, "--workers", "1", "--output", str(output), "--resume", "auto")
    command = (sys.executable, "-c", code, "train", *options, "--epochs", "1000")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both, deadline = [subprocess.Popen(command, **pipes) for _ in range(2)], time.monotonic() + 100
    try:
        while all(each.poll() is None for each in both) or not list(output.glob("state-*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (loser,) = [each for each in both if each.poll() is not None]
        error = loser.stderr.read()
        assert loser.returncode == 2
        assert f"--output {output}: another run" in error and error.count("\n") == 1
    finally:
        for each in both:
            each.kill()
            each.communicate()
    epochs = state_of(output)["state"]["epochs_done"] + 1
    assert main(["train", *options, "--epochs", str(epochs)]) == 0
    assert [row["epoch"] for row in metrics_of(output)] == list(range(1, epochs + 1))


def test_a_start_that_left_only_a_temporary_file_does_not_become_another_run(tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / ".run.json.writing").write_text('{"beg')
    resume = ("--output", str(output), "--resume", "auto")
    assert "its options are lost" in refused(capsys, *resume)
    assert "its options are lost" in refused(capsys, *resume, "--epochs", "2")
    assert train(output, "--epochs", "2", "--resume", "auto") == 0
