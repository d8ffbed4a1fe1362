"""Signals while a run waits for data or evaluates: one process, two processes, two nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t2tvit.cli import main
from t2tvit.training import pipeline
from t2tvit.training.checkpointing import Checkpointer
from t2tvit.training.trainer import Trainer
from tests.support.training.equality import assert_equal, without_times
from tests.support.training.tiny import TINY, metrics_of, newest, state_of

PROMPT = 8.0  # seconds, on a busy machine; loader processes that hang took 5 each, readers for ever
WHILE = 5.0  # seconds, until all that does not hang is done
EPOCHS = ("--epochs", "3", "--ema-decay", "0.99")


def train(output, *options) -> int:
    return main(["train", *TINY, *EPOCHS, "--output", str(output), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three epochs."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(output) == 0
    return output


def assert_same_end(first: Path, second: Path) -> None:
    """Bit-identical weights, averages, optimiser and metrics, and the same files."""
    contents = [state_of(output) for output in (first, second)]
    for content in contents:
        content["state"]["history"] = without_times(content["state"]["history"])
        del content["config"]
    assert_equal(*contents)
    for name in ("best.safetensors", "last.safetensors"):
        assert (first / name).exists() and (second / name).exists()
    assert without_times(metrics_of(first)) == without_times(metrics_of(second))
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}


class Hang:
    """Inside, reading hangs after the first ``images`` of datasets of the class ``kind``, and then
    this process gets SIGTERM; afterwards, it must not have taken long to end the block."""

    def __init__(self, kind: type, images: int):
        self.kind, self.left, self.read = kind, images, kind.__getitem__
        self.never, self.other_end = os.pipe()
        self.hangs, self.say_that_it_hangs = os.pipe()
        self.signalled = None

    def __enter__(self):
        hang = self
        self.kind.__getitem__ = lambda dataset, index: hang.item(dataset, index)
        threading.Thread(target=self.send, daemon=True).start()

    def __exit__(self, *_):
        self.kind.__getitem__ = self.read
        assert time.monotonic() - self.signalled < PROMPT

    def item(self, dataset, index):
        if type(dataset) is self.kind:
            self.left -= 1
            if self.left < 0:
                os.write(self.say_that_it_hangs, b"!")
                os.read(self.never, 1)
        return self.read(dataset, index)

    def send(self):
        os.read(self.hangs, 1)
        time.sleep(WHILE)
        self.signalled = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_hanging_reader_does_not_block_a_signal(tmp_path, capsys, whole, workers):
    """The state of the last update is saved, and the run resumes as if it had not been stopped."""
    output = tmp_path / "run"
    with Hang(pipeline.TrainingImages, 8 * 3 + 3):
        assert train(output, "--workers", workers) == 0
    assert "stopped by a signal; all progress is saved" in capsys.readouterr().out
    assert newest(output).stem == "state-00000-00000003"
    assert main(["train", "--output", str(output), "--resume", "auto", "--workers", "0"]) == 0
    assert_same_end(whole, output)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_hanging_held_out_image_does_not_block_a_signal(tmp_path, whole, workers):
    output = tmp_path / "run"
    with Hang(pipeline.TransformedImages, 9):
        assert train(output, "--workers", workers) == 0
    assert newest(output).stem == "state-00000-00000005"
    assert main(["train", "--output", str(output), "--resume", "auto", "--workers", "0"]) == 0
    assert_same_end(whole, output)


def test_data_that_hangs_when_opened_does_not_block_a_signal(tmp_path, capsys):
    with Hang(pipeline.TrainingImages, 0):
        assert train(tmp_path / "run") == 0
    assert (
        "stopped by a signal; training had not started. Repeat the command"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_that_is_killed_in_an_evaluation_loses_no_update(tmp_path, monkeypatch, whole, epoch):
    output, evaluate, calls = tmp_path / "run", Trainer.evaluate, []

    def killed(trainer):
        calls.append(None)
        if len(calls) == epoch:
            raise KeyboardInterrupt
        return evaluate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", killed)
        assert train(output) == 130
    assert newest(output).stem == f"state-0000{epoch - 1}-00000005"
    updates = []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "after_step", lambda _, trainer: updates.append(trainer.step))
        assert main(["train", "--output", str(output), "--resume", "auto"]) == 0
    assert len(updates) == 5 * (3 - epoch)
    assert_same_end(whole, output)


def test_a_state_before_an_evaluation_does_not_replace_others(whole, tmp_path):
    names = {path.stem for path in whole.glob("state-*")}
    assert names == {"state-00002-00000000", "state-00003-00000000"}
    assert train(tmp_path / "run", "--keep-checkpoints", "1") == 0
    assert [path.stem for path in (tmp_path / "run").glob("state-*")] == ["state-00003-00000000"]


KILLED = """
import os, signal, sys, time
from t2tvit.cli import main

parent = os.getpid()

def wait_for_the_kill():
    while os.getppid() == parent:
        time.sleep(0.01)

os.register_at_fork(
    after_in_parent=lambda: os.kill(parent, signal.SIGKILL), after_in_child=wait_for_the_kill
)
sys.exit(main())
"""


def test_a_run_that_is_killed_while_its_loader_starts_leaves_no_process(tmp_path):
    options = ("train", *TINY, "--workers", "1", "--output", str(tmp_path / "run"))
    command = (sys.executable, "-c", KILLED, *options)
    # The call returns when all processes have closed their output.
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert done.returncode == -signal.SIGKILL, done.stderr


PIPES = """
import faulthandler, os, sys
from pathlib import Path
from t2tvit.data.cifar import read_cifar
from t2tvit.errors import InputError
from t2tvit.class_names import read_names
from t2tvit.training.checkpointing.rewind import rows_in

faulthandler.dump_traceback_later(20, exit=True)
folder = Path(sys.argv[1])
for name in ("data_batch_2", "batches.meta", "data_batch_2.bin", "batches.meta.txt", "names"):
    os.mkfifo(folder / name)
for reads in (
    lambda: read_cifar("cifar10", folder, "train"),
    lambda: read_names(folder / "names", 10),
):
    try:
        reads()
    except InputError as error:
        assert "not a regular file" in str(error), error
assert rows_in(folder / "names") == 0
print("done")
"""


@pytest.mark.parametrize("version", ["data_batch_1", "data_batch_1.bin"])
def test_pipes_instead_of_files_are_errors_and_do_not_hang(tmp_path, version):
    (tmp_path / version).write_bytes(bytes(3073))
    command = (sys.executable, "-c", PIPES, str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


IN_EVALUATION = """
import os, signal, sys, time
from t2tvit.cli import main
from t2tvit.training import pipeline

read = pipeline.TransformedImages.__getitem__

def slow(self, index):
    if type(self) is pipeline.TransformedImages:
        if index == 1:  # rank 1's first
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)
    return read(self, index)

pipeline.TransformedImages.__getitem__ = slow
sys.exit(main())
"""


@pytest.mark.distributed
def test_a_signal_to_one_process_in_an_evaluation_ends_both_together(tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script = tmp_path / "slow.py"
    script.write_text(IN_EVALUATION)
    options = ("train", *TINY, "--data", "synthetic:88", "--epochs", "1")
    stopped, plain = tmp_path / "stopped", tmp_path / "plain"

    def started(*command):
        done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = started(str(script), *options, "--output", str(stopped))
    assert "stopped by a signal; all progress is saved" in out and "epoch 1/1" not in out
    assert newest(stopped).stem == "state-00000-00000011"
    started("-m", "t2tvit", "train", "--output", str(stopped), "--resume", "auto")
    started("-m", "t2tvit", *options, "--output", str(plain))
    assert_same_end(plain, stopped)


HANGING = """
import os, sys
from t2tvit.cli import main
from t2tvit.training import pipeline, stopping

stopping.PATIENCE_OF_MANY = 3.0
read, calls = pipeline.TrainingImages.__getitem__, []

def hanging(self, index):
    calls.append(None)
    if len(calls) > 30:
        print("hangs", flush=True)
        os.read(os.pipe()[0], 1)
    return read(self, index)

if os.environ["RANK"] == "1":
    pipeline.TrainingImages.__getitem__ = hanging
sys.exit(main())
"""


@pytest.mark.distributed
def test_a_process_of_two_whose_reader_hangs_ends_both_on_a_signal(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    output = tmp_path / "run"
    options = ("train", *TINY, *EPOCHS, "--output", str(output))
    children = [
        subprocess.Popen(
            [sys.executable, str(script), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    try:
        assert children[1].stdout.readline() == "hangs\n"
        time.sleep(1)
        started = time.monotonic()
        for child in children:
            child.send_signal(signal.SIGTERM)
        ends = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert time.monotonic() - started < 3 + 2 * PROMPT
    assert [child.returncode for child in children] == [1, 1], ends
    errors = "".join(error for _, error in ends)
    assert errors.count("\n") == 1 and "stopped by a signal while process 1 waited" in errors
    assert newest(output).stem == "state-00001-00000000"


@pytest.mark.distributed
def test_the_other_node_resumes_after_a_signal_to_one(tmp_path):
    """Elastic, from two nodes to one: torchrun restarts the node that got no signal."""
    output = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (*TINY, "--epochs", "20", "--checkpoint-minutes", "0", "--resume", "auto")
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"),
                *(
                    "--nproc_per_node=1",
                    "--max_restarts=3",
                    "--rdzv_backend=c10d",
                    "--rdzv_id=test",
                ),
                *(f"--rdzv_endpoint=127.0.0.1:{port}", "--monitor_interval=0.1"),
                f"--rdzv_conf=is_host={int(node == 0)},last_call_timeout=5",
                *("--local_addr=127.0.0.1", "-m", "t2tvit", "train", *options),
                *("--output", str(output)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As docs/training.md says.
            env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )
        for node in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("state-0000[1-9]-*.safetensors")):
            assert time.monotonic() < deadline and nodes[1].poll() is None, nodes[1].communicate()
            time.sleep(0.02)
        nodes[1].send_signal(signal.SIGTERM)
        ends = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 1], ends
    starts = json.loads((output / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 1]
    assert starts[1]["epochs_done"] > 0
    assert [row["epoch"] for row in metrics_of(output)] == list(range(1, 21))
