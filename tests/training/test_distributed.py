"""Two processes under torchrun: one run, one log, every held-out image counted once."""

import re
import subprocess
import sys

import pytest

from t2tvit.cli import main
from tests.training.tiny import HELD_OUT, TINY, metrics_of

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder and the log of two processes on the CPU."""
    output = tmp_path_factory.mktemp("ddp") / "run"
    options = ("train", *TINY, "--epochs", "2", "--output", str(output))
    done = subprocess.run([*LAUNCH, "-m", "t2tvit", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_two_processes_make_one_run(run):
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
    """torchrun reads ours too, and refuses what may abbreviate two of its own."""
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
        "from t2tvit.training import engine\n"
        "class Poisoned(engine.SoftTargetCrossEntropy):\n"
        "    def forward(self, *inputs):\n"
        "        return super().forward(*inputs) + float('nan')\n"
        "if os.environ['RANK'] == '1':\n"
        "    engine.SoftTargetCrossEntropy = Poisoned\n"
        "sys.exit(main())\n"
    )
    options = ("train", *TINY, "--epochs", "2", "--output", str(tmp_path / "run"))
    command = [*LAUNCH, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("t2tvit: error") == 1
    assert "not finite at step 5 of epoch 1, the 5. in a row (rank 1: loss nan" in done.stderr
    assert "rank 0" not in done.stderr
    files = {path.name for path in (tmp_path / "run").glob("not_finite-*")}
    assert files == {"not_finite-0.safetensors", "not_finite-1.safetensors"}
