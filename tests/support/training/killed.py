"""Trains in child processes and ends them at random moments; imports once, then forks.

Usage: python -m tests.support.training.killed RANKS SIGNALS OUTPUT OPTION...
SIGNALS end one attempt each: "KILL" all its processes, any other only the last rank's and its
workers. Prints each attempt's exit statuses; the last is left to finish.
"""

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from t2tvit.cli import main
from t2tvit.training import inference, run  # noqa: F401  imported before the fork
from tests.support.training.tiny import TINY

HANGS = 60.0  # seconds without a new checkpoint


def start(ranks: int, arguments: list[str]) -> list[int]:
    """The process ids of a run on ``ranks`` processes, each the leader of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            torch.set_num_threads(1)
            os._exit(main(arguments))
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit statuses; that of a killed process is negative."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def newest(output: Path) -> str:
    return max((path.name for path in output.glob("state-*.safetensors")), default="")


def train(ranks: int, signals: list[str], output: Path, options: list[str]) -> None:
    arguments = ["train", *TINY, *options, "--output", str(output), "--resume", "auto"]
    moments = random.Random(0)
    for name in signals:
        before, children = newest(output), start(ranks, arguments)
        since = time.monotonic()
        while newest(output) == before and not has_ended(children[0]):
            if time.monotonic() - since > HANGS:
                raise TimeoutError(f"no checkpoint after {before or 'the start'}")
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        for child in children if name == "KILL" else children[-1:]:
            os.killpg(child, signal.Signals[f"SIG{name}"])
        print(name, wait(children), flush=True)
    print("end", wait(start(ranks, arguments)), flush=True)


if __name__ == "__main__":
    # Ignored under nohup, which the runs would inherit.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    train(int(sys.argv[1]), sys.argv[2].split(), Path(sys.argv[3]), sys.argv[4:])
