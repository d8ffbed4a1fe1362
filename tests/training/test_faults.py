"""If one of two processes fails, the cause is reported once."""

import subprocess
import sys

import pytest

from t2tvit.cli import main
from t2tvit.errors import RunError
from t2tvit.training.distributed import explained
from tests.support.training import faults
from tests.support.training.ranks import run_ranks
from tests.support.training.tiny import TINY

pytestmark = pytest.mark.distributed

OPTIONS = ("train", *TINY, "--epochs", "2", "--workers", "1", "--checkpoint-minutes", "0")
FAULTS = {
    "input_error": (2, "something is wrong with the input"),
    "run_error": (1, "something broke"),
    "vanished": (1, "No such file or directory"),
    "worker": (1, "a loader process was lost"),
    "killed": (1, "another process of the run was lost"),
}


def alone(fault, ranks, folder):
    """Exit statuses and standard errors of two processes, some of which meet a fault."""
    command = (fault, ranks, *OPTIONS, "--output", folder / "run")
    return run_ranks(folder, faults.main, (command, command))


def test_an_error_before_the_processes_join_is_reported_once(tmp_path):
    (tmp_path / "damaged.yaml").write_text("epochs: [")
    good = (*OPTIONS, "--output", tmp_path / "run")
    bad = (*OPTIONS, "--output", tmp_path / "run", "--config", tmp_path / "damaged.yaml")
    for options, where in (((good, bad), " (process 1)"), ((bad, good), ""), ((bad, bad), "")):
        codes, errors = run_ranks(tmp_path, main, options)
        assert "".join(errors).startswith(f"t2tvit: error{where}: config "), errors
        assert "".join(errors).count("\n") == 1 and all(codes)
    evaluate = ("eval", "--device", "cpu", "--checkpoint", tmp_path / "damaged.yaml")
    models = ("t2t_vit_7", "none")
    codes, errors = run_ranks(tmp_path, main, [(*evaluate, "--model", name) for name in models])
    assert "".join(errors).count("\n") == 1 and codes == [2, 2], errors


CAUGHT = "Caught RuntimeError in DataLoader worker process 0. Original Traceback: RuntimeError: "
FULL = {
    "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)": (
        "no shared memory left in /dev/shm"
    ),
    "unable to write to file </torch_1_2_0>: No space left on device (28)": "left in /dev/shm",
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 80000000000 bytes. Error code 12 (Cannot allocate memory)": "memory is full; lower --b",
}


@pytest.mark.parametrize("text", FULL)
def test_full_memory_is_explained(text):
    for error in (RuntimeError(text), RuntimeError(CAUGHT + text)):
        explanation = explained(error)
        assert isinstance(explanation, RunError) and FULL[text] in str(explanation)
    assert "memory is full" in str(explained(MemoryError()))
    assert explained(mistake := RuntimeError("shapes differ")) is mistake


def test_processes_with_different_commands_are_refused(tmp_path):
    first, logs = (*OPTIONS, "--output", tmp_path / "a"), tmp_path / "logs"
    logs.mkdir()
    for other, name in (
        ((*OPTIONS, "--output", tmp_path / "b"), "--output"),
        ((*first, "--seed", "3"), "seed"),
    ):
        codes, errors = run_ranks(logs, main, (first, other))
        assert "".join(errors).startswith(f"t2tvit: error: {name}: process 1 has "), errors
        assert "".join(errors).count("\n") == 1 and codes == [2, 2]
    assert list(tmp_path.iterdir()) == [logs]


@pytest.mark.parametrize("ranks", ["0", "1", "0,1"])
@pytest.mark.parametrize("fault", ["input_error", "run_error"])
def test_an_error_is_reported_once_with_its_rank(tmp_path, fault, ranks):
    status, text = FAULTS[fault]
    codes, errors = alone(fault, ranks, tmp_path)
    where = " (process 1)" if ranks == "1" else ""
    assert "".join(errors) == f"t2tvit: error{where}: {text}\n"
    assert all(codes[int(rank)] == status for rank in ranks.split(",")) and all(codes)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("fault", ["vanished", "worker", "killed"])
def test_a_lost_process_is_reported_in_one_line(tmp_path, fault, rank):
    _, text = FAULTS[fault]
    codes, errors = alone(fault, rank, tmp_path)
    error = "".join(errors)
    assert all(codes), codes
    assert error.startswith("t2tvit: error") and error.count("\n") == 1, error
    assert text in error


def test_a_bug_keeps_its_traceback(tmp_path):
    codes, errors = alone("bug", "1", tmp_path)
    assert codes == [1, 1]
    assert errors[0] == "" and errors[1].endswith("KeyError: 'a mistake in the program'\n")
    assert errors[1].count("Traceback") == 1


@pytest.mark.parametrize("fault", ["input_error", "vanished", "worker"])
def test_under_torchrun_the_cause_is_reported_once(tmp_path, fault):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    command += ("-m", "tests.support.training.faults", fault, "1", *OPTIONS)
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert done.stderr.count("t2tvit: error") == 1 and FAULTS[fault][1] in done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own, and no other"
