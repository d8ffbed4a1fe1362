"""``t2tvit`` with a fault in the first update of some ranks.

Usage: python -m tests.support.training.faults FAULT RANK,... ARGUMENT...
"""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

from t2tvit import cli
from t2tvit.errors import InputError, RunError
from t2tvit.training.trainer import Trainer

accumulate = Trainer.accumulate


def input_error(*_):
    raise InputError("something is wrong with the input")


def run_error(*_):
    raise RunError("something broke")


def bug(*_):
    raise KeyError("a mistake in the program")


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def vanished(*inputs):
    shutil.rmtree(Path(sys.argv[sys.argv.index("--output") + 1]))
    return accumulate(*inputs)


def worker(*inputs):
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    return accumulate(*inputs)


def main(arguments: list[str]) -> int:
    """The exit status of ``t2tvit`` with the usage above."""
    fault, ranks, *arguments = arguments
    if os.environ["RANK"] in ranks.split(","):
        Trainer.accumulate = globals()[fault]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
