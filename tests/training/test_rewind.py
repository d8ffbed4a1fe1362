"""A run that resumes from an older state: all its files belong to the resumed run."""

import shutil

import pytest

from t2tvit.cli import main
from t2tvit.training.checkpointing import RunFolder, read_about
from t2tvit.training.checkpointing.states import read_state, state_name
from t2tvit.training.trackers import ID_FILE
from t2tvit.training.trainer import Trainer
from tests.support.training.equality import assert_equal, without_times
from tests.support.training.tiny import TINY, metrics_of, newest

TOP1 = [20.0, 50.0, 30.0, 40.0, 60.0, 10.0]  # of each epoch
one_epoch = Trainer.one_epoch


def graded(trainer):
    metrics = one_epoch(trainer)
    return metrics | {"top1": TOP1[metrics["epoch"] - 1]}


@pytest.fixture(autouse=True)
def grades(monkeypatch):
    monkeypatch.setattr(Trainer, "one_epoch", graded)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of five epochs that keeps every state."""
    output = tmp_path_factory.mktemp("whole") / "run"
    options = ("--epochs", "5", "--checkpoint-minutes", "0", "--keep-checkpoints", "99")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "one_epoch", graded)
        assert main(["train", *TINY, "--output", str(output), *options]) == 0
    return output


@pytest.fixture
def output(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def resume(state, *options) -> int:
    return main(["train", "--resume", str(state), *options])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(output, epochs, best=None):
    """Check that the files of a run of ``epochs`` epochs fit together; ``best`` overrides the best."""
    metrics = metrics_of(output)
    assert [row["epoch"] for row in metrics] == list(range(1, epochs + 1))
    best = best or max(range(epochs), key=lambda index: (TOP1[index], index)) + 1
    for name, epoch in (("best.safetensors", best), ("last.safetensors", epochs)):
        about = read_about(output / name)
        assert (about.epoch, about.top1) == (epoch, TOP1[epoch - 1]), name
    assert newest(output).name == state_name(epochs, 0)
    assert read_state(newest(output))["state"]["history"] == metrics


@pytest.mark.parametrize("moves", [False, True], ids=["in-place", "moved"])
@pytest.mark.parametrize(
    "epoch, step, epochs", [(1, 0, 1), (1, 0, 2), (3, 0, 3), (3, 0, 4), (2, 3, 3), (0, 2, 1)]
)
def test_files_fit_the_older_state_after_resuming(
    tmp_path, output, capsys, epoch, step, epochs, moves
):
    before = contents(output)
    state = output / state_name(epoch, step)
    place = tmp_path / "new" if moves else output
    assert resume(state, "--epochs", str(epochs), "--output", str(place)) == 0
    check(place, epochs)
    log = capsys.readouterr().out
    if moves:
        assert contents(output) == before
        assert f"not copied {output}/best.safetensors, {output}/last.safetensors: " in log
        assert not list(place.glob("*.set-aside*"))
        return
    (line,) = [line for line in log.splitlines() if line.startswith("renamed files ")]
    later = [name for name in before if name.startswith("state-") and name > state.name]
    for name in (*later, "best.safetensors", "last.safetensors", "metrics.jsonl"):
        assert (output / f"{name}.set-aside").read_bytes() == before[name]
        assert f"{name} to {name}.set-aside" in line
    assert (output / "curves.png").read_bytes() != before["curves.png"]


def test_an_older_state_ends_as_the_run_did(whole, output):
    assert resume(output / state_name(2, 3)) == 0
    check(output, 5)
    for name in ("best.safetensors", "last.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    first, second = (read_state(newest(place))["state"] for place in (whole, output))
    for state in (first, second):
        state["history"] = without_times(state["history"])
    assert_equal(first, second)


def test_files_set_aside_do_not_replace_each_other(output):
    state = output / state_name(2, 0)
    first = (output / "metrics.jsonl").read_bytes()
    assert resume(state, "--epochs", "3") == 0
    second = (output / "metrics.jsonl").read_bytes()
    assert resume(state, "--epochs", "4") == 0
    assert (output / "metrics.jsonl.set-aside").read_bytes() == first
    assert (output / "metrics.jsonl.set-aside-2").read_bytes() == second
    check(output, 4)


def test_a_tracker_gets_a_new_run_after_a_rewind(output):
    (output / ID_FILE).write_text("0123456789abcdef")
    assert resume(output / state_name(4, 0)) == 0
    assert (output / f"{ID_FILE}.set-aside").read_text() == "0123456789abcdef"


@pytest.mark.parametrize("moves", [False, True], ids=["in-place", "moved"])
def test_lost_best_weights_are_replaced_by_the_best_remaining(tmp_path, output, capsys, moves):
    """Epoch 2 was the best until epoch 4, but epoch 5 replaced its weights."""
    for path in output.glob("state-*"):
        if path.name < state_name(4, 0):
            path.unlink()
    place = tmp_path / "new" if moves else output
    assert resume(output / state_name(4, 0), "--epochs", "4", "--output", str(place)) == 0
    check(place, 4, best=4)
    log = capsys.readouterr().out
    assert "weights   best.safetensors: epoch 4; those of epoch 2 are lost" in log
    assert "finished 4 epochs in 0:00:0" in log and "best top-1 40.00% in epoch 4" in log
    assert main(["train", "--output", str(place), "--resume", "auto", "--epochs", "6"]) == 0
    check(place, 6)


def test_without_any_weights_the_next_epoch_is_the_best(output, capsys):
    for path in output.glob("state-*"):
        if path.name < state_name(2, 1):
            path.unlink()
    assert resume(output / state_name(2, 1), "--epochs", "3") == 0
    check(output, 3, best=3)
    log = capsys.readouterr().out
    assert "best.safetensors: none until the next epoch ends; those of epoch 2 are lost" in log
    assert "last.safetensors: none until the next epoch ends; those of epoch 2 are lost" in log


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"half"], ids=["missing", "empty", "damaged"])
def test_lost_weights_are_restored_from_a_state(whole, output, name, content):
    (output / name).unlink()
    if content is not None:
        (output / name).write_bytes(content)
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    aside = output / f"{name}.set-aside"
    assert aside.exists() == (content is not None)


@pytest.mark.parametrize("moves", [False, True], ids=["in-place", "moved"])
def test_a_state_of_any_name_is_found_again_after_a_kill(tmp_path, output, monkeypatch, moves):
    """By --resume auto, before the run saves its next state."""
    named = output / "my state.safetensors"
    (output / state_name(3, 0)).rename(named)
    place = tmp_path / "new" if moves else output

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", killed)
        assert resume(named, "--output", str(place)) == 130
    assert newest(place).name == state_name(3, 0)
    assert main(["train", "--output", str(place), "--resume", "auto"]) == 0
    check(place, 5)


def test_a_run_with_fewer_epochs_than_done_is_refused_with_a_remedy(output, capsys):
    capsys.readouterr()
    assert main(["train", "--output", str(output), "--resume", "auto", "--epochs", "2"]) == 2
    line = capsys.readouterr().err
    assert "has done 5; raise --epochs, or resume an older state with --resume FILE" in line


def test_a_killed_start_in_another_folder_may_be_repeated_from_an_older_state(
    tmp_path, output, monkeypatch
):
    """Files that the first start copied are removed."""
    place = ("--output", str(tmp_path / "new"))

    def killed(*_):
        raise KeyboardInterrupt

    for path in output.glob("state-00002-*"):
        if path.name != state_name(2, 3):
            path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record_start", killed)
        assert resume(output, *place) == 130
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", killed)
        assert resume(output / state_name(2, 3), *place) == 130
    assert newest(tmp_path / "new").name == state_name(2, 3)
    assert read_about(tmp_path / "new" / "best.safetensors").epoch == 1
    assert not (tmp_path / "new" / "last.safetensors").exists()
    assert main(["train", *place, "--resume", "auto"]) == 0
    check(tmp_path / "new", 5)


@pytest.mark.parametrize("moves", [False, True], ids=["in-place", "moved"])
def test_a_resumed_run_keeps_its_number_of_epochs(tmp_path, output, monkeypatch, moves):
    """Also if it is killed before it saves a state, or has no epochs left."""
    place = tmp_path / "new" if moves else output

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", killed)
        assert resume(output / state_name(2, 3), "--epochs", "4", "--output", str(place)) == 130
    assert main(["train", "--output", str(place), "--resume", "auto"]) == 0
    check(place, 4)
    assert resume(place / state_name(4, 0), "--epochs", "4") == 0
    assert main(["train", "--output", str(place), "--resume", "auto"]) == 0
    check(place, 4)
