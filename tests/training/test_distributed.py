"""Two processes under torchrun: one run, one log, each held-out image counted once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from t2tvit.cli import main
from t2tvit.training.distributed import torchrun_store
from tests.support.training.tiny import HELD_OUT, TINY, metrics_of, state_of

pytestmark = pytest.mark.distributed

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder and the log of two processes on the CPU."""
    output = tmp_path_factory.mktemp("ddp") / "run"
    options = ("train", *TINY, "--epochs", "2", "--output", str(output))
    done = subprocess.run([*LAUNCH, "-m", "t2tvit", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_two_processes_are_one_run(run):
    output, log = run
    assert "world size 2" in log and "global batch 8 (4 per process)" in log
    assert log.count("epoch 2/2") == 1
    assert [row["epoch"] for row in metrics_of(output)] == [1, 2]


def test_each_held_out_image_is_counted_once(run, capsys):
    """11 images on 2 processes: a single process finds the same loss and accuracy."""
    output, _ = run
    last = metrics_of(output)[-1]
    assert last["eval_images"] == HELD_OUT
    assert main(["eval", "--run", str(output), "--weights", "last"]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {last['top1']:.2f}%" in out
    assert f"loss {last['eval_loss']:.4f}  {HELD_OUT} images" in out


def test_no_option_collides_with_torchrun_s(capsys):
    """torchrun also reads our options, and refuses abbreviations of two of its own."""
    from torch.distributed.run import get_args_parser

    theirs = re.findall(r"--[a-z-]+", get_args_parser().format_help())
    for command in ("train", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        for option in re.findall(r"^  (--.*)", capsys.readouterr().out, re.MULTILINE):
            names = re.findall(r"--[a-z-]+", option.partition("  ")[0])
            free = [name for name in names if not any(their.startswith(name) for their in theirs)]
            assert free, f"torchrun would take {names} for {theirs}"


def test_a_refusal_ends_all_processes_with_one_line(run):
    output, _ = run
    options = ("train", *TINY, "--epochs", "2", "--output", str(output))
    done = subprocess.run([*LAUNCH, "-m", "t2tvit", *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("t2tvit: error") == 1
    assert "is not empty" in done.stderr


def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_one_line(tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, sys\n"
        "from t2tvit.cli import main\n"
        "from t2tvit.training import trainer\n"
        "class Poisoned(trainer.SoftTargetCrossEntropy):\n"
        "    def forward(self, *inputs):\n"
        "        return super().forward(*inputs) + float('nan')\n"
        "if os.environ['RANK'] == '1':\n"
        "    trainer.SoftTargetCrossEntropy = Poisoned\n"
        "sys.exit(main())\n"
    )
    options = ("train", *TINY, "--epochs", "2", "--output", str(tmp_path / "run"))
    command = [*LAUNCH, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("t2tvit: error") == 1
    assert "not finite at step 5 of epoch 1, 5 times in a row (rank 1: loss nan" in done.stderr
    assert "rank 0" not in done.stderr
    files = {path.name for path in (tmp_path / "run").glob("not_finite-*")}
    assert files == {"not_finite-0.safetensors", "not_finite-1.safetensors"}


def test_two_processes_train_like_one_with_the_same_global_batch(tmp_path):
    """The weights after 10 updates agree up to float32 sums; each process uses two pieces."""
    off = ("--drop-path", "0", "--random-erasing", "0", "--mixup", "0", "--cutmix", "0")
    rate = ("--optimizer", "momentum", "--lr", "0.05", "--min-lr", "0.01")
    options = (*TINY, "--model", "t2t_vit_t_14", *off, *rate, "--epochs", "2")
    assert main(["train", *options, "--output", str(tmp_path / "one")]) == 0
    command = (
        sys.executable,
        "-m",
        "tests.support.training.killed",
        "2",
        "",
        str(tmp_path / "two"),
    )
    done = subprocess.run(
        [*command, *options, "--accumulate", "2"], capture_output=True, text=True, timeout=120
    )
    assert "end [0, 0]" in done.stdout, done.stderr
    one, two = (state_of(tmp_path / name)["state"] for name in ("one", "two"))
    assert one["updates"] == two["updates"] == 10
    for name, value in one["model"].items():
        error = (two["model"][name] - value).norm()
        assert error <= 1e-5 * value.norm() + 1e-6, f"{name}: {error:.1e} of {value.norm():.1e}"
    first, second = (metrics_of(tmp_path / name)[-1] for name in ("one", "two"))
    assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-5)
    assert second["top1"] == first["top1"]


def test_the_slurm_script_starts_a_process_per_task_and_requeues_a_stopped_run(tmp_path):
    """Slurm's commands and python are replaced."""
    commands = {
        "scontrol": 'echo "$@" >> "$TRACE"; echo node7; echo node8',
        "srun": 'shift; SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 exec "$@"',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*"; echo "$SAYS"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parents[2] / "scripts" / "train.sbatch"
    for says, is_requeued in (("finished 3 epochs", False), ("stopped by a signal; all", True)):
        trace = tmp_path / says[:8]
        done = subprocess.run(
            ["bash", str(script), "--output", "a run"],
            env=os.environ
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRACE": str(trace), "SAYS": says}
            | {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "9 1 16 node7 -m t2tvit train --resume auto --output a run" in done.stdout
        assert ("requeue 41" in trace.read_text()) == is_requeued


def test_a_restart_ignores_dead_processes(monkeypatch):
    """torchrun keeps its store when it restarts the processes of a node."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in {"ADDR": "127.0.0.1", "PORT": server.port}.items():
        monkeypatch.setenv(f"MASTER_{name}", str(value))
    for name, value in {"USE_AGENT_STORE": True, "MAX_RESTARTS": 1, "RESTART_COUNT": 0}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    torchrun_store(0, 2).set("address", "of a process that dies")
    assert torchrun_store(1, 2).get("address") == b"of a process that dies"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not torchrun_store(0, 2).check(["address"])


def test_two_nodes_resume_after_a_training_process_is_killed(tmp_path):
    """Two nodes of one process each; after a kill, both are restarted."""
    output = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (*TINY, "--epochs", "8", "--checkpoint-minutes", "0", "--resume", "auto")
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                *(
                    "--nproc_per_node=1",
                    "--max_restarts=3",
                    "--rdzv_backend=c10d",
                    "--rdzv_id=test",
                ),
                *(f"--rdzv_endpoint=127.0.0.1:{port}", "--monitor_interval=0.1"),
                *(f"--rdzv_conf=is_host={int(node == 0)}", "--local_addr=127.0.0.1"),
                *("-m", "t2tvit", "train", *options, "--output", str(output)),
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
        while not list(output.glob("state-*.safetensors")):
            assert time.monotonic() < deadline and nodes[1].poll() is None, nodes[1].communicate()
            time.sleep(0.02)
        (child,) = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        ends = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], ends
    starts = json.loads((output / "run.json").read_text())["starts"]
    # How often depends on which node notices what first.
    assert len(starts) >= 2 and {start["world_size"] for start in starts} == {2}
    assert starts[-1]["step"] + starts[-1]["epochs_done"] > 0
    assert [row["epoch"] for row in metrics_of(output)] == list(range(1, 9))
