"""Runs that are killed, stopped, or whose newest state is damaged."""

import json
import shutil
import subprocess
import sys

import pytest

from t2tvit.cli import main
from tests.support.training.equality import assert_equal, without_times
from tests.support.training.tiny import TINY, metrics_of, state_of

pytestmark = pytest.mark.slow

OFTEN = ("--epochs", "6", "--checkpoint-minutes", "0")


def attempts(ranks, signals, output, *options):
    """The output of each attempt, and the exit statuses of its processes."""
    command = (
        sys.executable,
        "-m",
        "tests.support.training.killed",
        str(ranks),
        signals,
        str(output),
    )
    done = subprocess.run([*command, *OFTEN, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"end {[0] * ranks}", done.stdout + done.stderr
    return done.stdout


def assert_same_run(whole, parts):
    """Bit-identical states, weights and metrics, and the same files."""
    first, second = state_of(whole), state_of(parts)
    for content in (first, second):
        content["state"]["history"] = without_times(content["state"]["history"])
    assert_equal(first, second)
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert without_times(metrics_of(whole)) == without_times(metrics_of(parts))
    assert {path.name for path in whole.iterdir()} == {path.name for path in parts.iterdir()}


@pytest.mark.parametrize(
    "ranks, options",
    [
        pytest.param(1, ("--workers", "1", "--amp", "bfloat16"), id="worker-bf16"),
        pytest.param(2, ("--clip-grad", "1"), id="two-ranks", marks=pytest.mark.distributed),
    ],
)
def test_a_run_killed_or_stopped_at_random_ends_like_an_uninterrupted_one(tmp_path, ranks, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    attempts(ranks, "", whole, *options)
    log = attempts(ranks, "TERM KILL KILL USR1 HUP KILL KILL", parts, *options)
    for name in ("TERM", "USR1", "HUP"):
        assert f"{name} {[0] * ranks}\n" in log
    assert log.count(f"--output {parts} --resume auto") == 3
    assert log.count(f"KILL {[-9] * ranks}\n") >= 2, "the run was over before it was killed"
    starts = json.loads((parts / "run.json").read_text())["starts"]
    assert sum(start["step"] > 0 for start in starts) >= 2
    assert_same_run(whole, parts)


def kill_and_resume(folder, count, kind):
    """The operation of each kill, and whether the run ended like an undisturbed one."""
    command = (
        sys.executable,
        "-m",
        "tests.support.training.killed_at",
        str(folder),
        str(count),
        kind,
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for operation, name, run, killed, resumed in results:
        assert (killed, resumed) == (-9, 0), (operation, name, run)
        for output in (folder / "whole", folder / run):
            for path in output.glob("*.set-aside*"):
                path.unlink()
        assert_same_run(folder / "whole", folder / run)
    return [(operation, name) for operation, name, *_ in results]


@pytest.mark.parametrize("kind, count", [("new", 10), ("moved", 4), ("older", 4)])
def test_a_run_killed_at_a_file_operation_ends_like_an_uninterrupted_one(tmp_path, kind, count):
    """At a sample of different operations on different files."""
    operations = kill_and_resume(tmp_path, count, kind)
    assert len(set(operations)) == count
    assert len({operation for operation, _ in operations}) >= min(count, 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs that keeps every state."""
    output = tmp_path_factory.mktemp("finished") / "run"
    options = ("--epochs", "2", "--checkpoint-minutes", "0", "--keep-checkpoints", "99")
    assert main(["train", *TINY, *options, "--output", str(output)]) == 0
    return output


def test_as_many_states_are_kept_as_asked(finished, tmp_path):
    assert len(list(finished.glob("state-*"))) == 12  # 5 updates and the evaluation, twice
    output = tmp_path / "run"
    options = ("--epochs", "2", "--checkpoint-minutes", "0", "--keep-checkpoints", "3")
    assert main(["train", *TINY, *options, "--output", str(output)]) == 0
    kept = sorted(path.name for path in finished.glob("state-*"))[-3:]
    assert sorted(path.name for path in output.glob("state-*")) == kept


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_an_older_state_replaces_a_damaged_one(finished, tmp_path, capsys, damage):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    states = sorted(output.glob("state-*"))
    for path in states[-2:]:
        damage(path)
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    for line, path in zip(warnings, states[:-3:-1], strict=True):
        assert f"training state {path} is damaged" in line
        assert f"resuming from {states[-3]} instead" in line
    names = [*(path.name for path in states[-2:]), "best.safetensors", "last.safetensors"]
    for name in (*names, "metrics.jsonl"):
        (output / f"{name}.set-aside").unlink()
    assert_same_run(finished, output)


def test_a_run_whose_states_are_all_damaged_is_refused(finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for path in output.glob("state-*"):
        flip(path)
    assert main(["train", "--output", str(output), "--resume", "auto"]) == 2
    line = capsys.readouterr().err
    assert f"every training state in {output} is damaged" in line and line.count("\n") == 1


def test_a_stopped_run_resumes_with_another_number_of_workers(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    state = output / "state-00001-00000002.safetensors"
    options = ("--resume", str(state), "--workers", "2", "--checkpoint-minutes", "10")
    assert main(["train", "--output", str(output), *options]) == 0
    first, second = state_of(finished)["state"], state_of(output)["state"]
    assert_equal(dict(first["ema"]), dict(second["ema"]))
    assert without_times(metrics_of(finished)) == without_times(metrics_of(output))
