"""The processes of a run, forked from a server that imports the trainer once."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.training.faults"])
LONGEST = 120  # seconds


def run_ranks(
    folder: Path, main: Callable[[list[str]], int], arguments: Sequence[Sequence]
) -> tuple[list[int], list[str]]:
    """Exit statuses and standard errors of processes that are started by hand, as by Slurm.

    Args:
        folder: where their standard errors are written.
        main: of this package or of ``t2tvit``; what it returns is the exit status.
        arguments: those of each process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(arguments))}
    children, logs = [], []
    for rank, own in enumerate(arguments):
        environment = dict(os.environ) | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        logs.append(folder / f"rank-{rank}.log")
        begin = (main, [str(each) for each in own], environment, logs[-1])
        children.append(SERVER.Process(target=_begin, args=begin))
        children[-1].start()
    try:
        for child in children:
            child.join(LONGEST)
            assert child.exitcode is not None, f"runs for more than {LONGEST} s"
    finally:
        for child in children:
            child.kill()
    return [child.exitcode for child in children], [log.read_text() for log in logs]


def _begin(main, arguments, environment, log) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    # The server's children would start their own workers through servers, which a run does not.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    for descriptor, path in ((1, os.devnull), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    status = 1
    try:
        status = main(arguments)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    # multiprocessing would first wait for what the process has started.
    os._exit(status)
