"""Kills tiny runs at file operations, each in a folder of its own, and resumes each with --resume auto.

Usage: python -m tests.support.training.killed_at FOLDER COUNT KIND

KIND is how the run starts: "new", "moved" (from a state of another folder) or "older" (from an older
state of its own folder). COUNT operations are taken, spread over their kinds and files. The
last line is JSON: for each kill the operation, the file, the run's folder in FOLDER, and the exit
statuses of both attempts. An undisturbed run that started in the same way is FOLDER/whole.
"""

import json
import os
import re
import shutil
import signal
import stat
import sys
from collections import Counter
from pathlib import Path

import torch

from t2tvit.cli import main
from t2tvit.training import inference, run  # noqa: F401  imported before the fork
from tests.support.training.tiny import TINY

OPTIONS = (*TINY, "--epochs", "2", "--checkpoint-minutes", "0", "--keep-checkpoints", "8")
EVENTS = {"os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir"}


class Operations:
    """Counts the file operations of this process in ``folder``; SIGKILL comes before number ``last``.

    ``seen`` has the kind and the file of each. A write that is killed leaves half of the file.
    """

    def __init__(self, folder: Path, last: int | None):
        self.folder, self.last, self.seen, self.opened = str(folder), last, [], ""
        self.fsync, os.fsync = os.fsync, self.synchronise
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        kind = EVENTS.get(event)
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) or flags & os.O_CREAT:
                kind = "open"
            elif isinstance(path, str | os.PathLike) and os.path.isdir(path):
                kind = "open folder"
        if kind is None or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if path.startswith(self.folder):
            self.opened = path
            self.reach(kind)

    def synchronise(self, file: int) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            self.reach("fsync folder")
        else:
            self.reach("write", file)
            self.reach("fsync")
        self.fsync(file)

    def reach(self, kind: str, file: int | None = None) -> None:
        name = re.sub(r"^\.(.*)\.writing$", r"\1", Path(self.opened).name)
        name = re.sub(r"^state-.*\.safetensors", "state.safetensors", name)
        if len(self.seen) == self.last:
            if file is not None:
                os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((kind, name))


def train(arguments: list, folder: Path, last: int | None, log: Path | None = None) -> int:
    """Run in a child process; returns the exit status, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        operations = Operations(folder, last)
        status = main([str(each) for each in arguments])
        if log is not None:
            log.write_text(json.dumps(operations.seen))
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def chosen(seen: list, count: int) -> list[int]:
    """The numbers of ``count`` operations, with each kind and file about equally often."""
    used, left, result = Counter(), list(range(len(seen))), []
    while left and len(result) < count:
        # Of a pair that was taken before, the last one left: from another part of the run.
        number = min(
            left, key=lambda each: [used[seen[each]], *(used[part] for part in seen[each])]
        )
        if used[seen[number]]:
            number = max(each for each in left if seen[each] == seen[number])
        used.update((seen[number], *seen[number]))
        left.remove(number)
        result.append(number)
    return result


def kill_all(folder: Path, count: int, kind: str) -> list:
    """What the usage above says."""
    source, whole, log, nowhere = (folder / each for each in ("source", "whole", "log", "nowhere"))
    if kind != "new":
        assert train(["train", *OPTIONS, "--output", source], nowhere, None) == 0
        states = sorted(source.glob("state-*"))
        middle = states[len(states) // 2]
        if kind == "moved":
            for path in states[len(states) // 2 + 1 :]:
                path.unlink()

    def start(output: Path) -> list:
        if kind == "new":
            return ["train", *OPTIONS, "--output", output]
        if kind == "moved":
            return ["train", "--resume", source, "--output", output]
        shutil.copytree(source, output)
        return ["train", "--resume", output / middle.name]

    assert train(start(whole), whole, None, log) == 0
    seen = [tuple(each) for each in json.loads(log.read_text())]
    results = []
    for number in chosen(seen, count):
        output = folder / f"run-{number:03d}"
        statuses = [train(start(output), output, number)]
        again = ["train", *(OPTIONS if kind == "new" else ()), "--output", output]
        if kind == "moved" and not (output / "run.json").exists():
            again += ["--resume", source]  # nothing but the folder
        else:
            again += ["--resume", "auto"]
        statuses.append(train(again, nowhere, None))
        results.append([*seen[number], output.name, *statuses])
    return results


if __name__ == "__main__":
    print(json.dumps(kill_all(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
