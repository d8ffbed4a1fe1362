"""One process or many: torchrun's variables, collectives, and which process reports an error."""

import contextlib
import itertools
import os
import re
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2t_kernels import BackendUnavailable
from t2tvit.errors import InputError, OneRankError, RunError, SaidElsewhere
from t2tvit.terminal import printable

REPORTED = (InputError, RunError, BackendUnavailable)  # in one line, by the command line
# PyTorch's messages if the CPU's memory is full, or the memory that loader processes share.
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
Result = TypeVar("Result")
NO_SHARED_MEMORY = re.compile(r"unable to \w+ .{0,40}</torch_\w+>: [\w ]+")
PATIENCE = 5.0  # seconds, for another process to report why it ends


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and the device of this process."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shared(self) -> dist.Store:
        """The store in which several processes tell each other what ends the run."""
        assert self.store is not None, "a process that is alone has no store"
        return self.store

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only; control characters in ``text`` are escaped."""
        if self.is_main:
            print(printable(text), flush=True)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on rank 0; every rank returns its result or raises its error."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (InputError, RunError) as error:
                outcome[1] = error
            except Exception:
                dist.broadcast_object_list([None, SaidElsewhere(1)], device=self.device)
                raise
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: object) -> list:
        """``value`` of every rank, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def check_same(self, values: dict[str, object]) -> None:
        """Raise an InputError on every rank unless all ranks have the same ``values`` (name → value)."""
        every = self.gather(values)
        for rank, name in itertools.product(range(self.size), values):
            own, first = every[rank][name], every[0][name]
            if own != first:
                raise InputError(
                    f"{name}: process {rank} has {str(own)[:200]}, process 0 has {str(first)[:200]}; give "
                    "every process the same command, with an output on a shared file system"
                )

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum of ``values`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def minimum(self, values: Tensor) -> Tensor:
        """Elementwise minimum of ``values`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Broadcast rank 0's buffers, such as the statistics of batch norm, which are the saved ones."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def attributed(self, error: Exception) -> Exception:
        """The exception to raise for ``error``, so that only one process reports the cause."""
        if isinstance(error, SaidElsewhere):
            return error
        if is_lost_connection(error):
            return self._lost()
        text = str(error)
        with contextlib.suppress(RuntimeError):  # the process with the store has ended
            self.shared.set("cause", text)
            if self.is_main:
                self.shared.set("cause of main", text)
        if not isinstance(error, REPORTED):
            return error
        if not self.is_main and not getattr(error, "of_one_rank", False):
            if self._said("cause of main") is not None:
                return SaidElsewhere(1 if isinstance(error, RunError) else 2)
            own: Any = error  # the kernels' errors do not declare it
            own.of_one_rank = True
        return error

    def _lost(self) -> Exception:
        """The exception to raise if another process has ended, possibly without reporting why."""
        # A killed process closes its connections one by one, that of the store perhaps last. PyTorch
        # logs a traceback if the store is used in between.
        time.sleep(0.3)
        if self._said("cause") is not None:
            return SaidElsewhere(1)
        with contextlib.suppress(RuntimeError):
            if has_store() and self.shared.add("lost", 1) > 1:
                return SaidElsewhere(1)
        error = RunError(
            "another process of the run was lost, possibly killed for lack of memory; the last "
            "checkpoint is intact"
        )
        error.of_one_rank = True
        return error

    def _said(self, key: str) -> str | None:
        """The value that a process stores under ``key`` within PATIENCE; None if there is none."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(RuntimeError):
            while has_store() and time.monotonic() < deadline:
                if self.shared.check([key]):
                    return self.shared.get(key).decode()
                time.sleep(0.05)
        return None

    def leave(self) -> None:
        """Let the main process end last if it hosts the store, where the others look for the cause."""
        with contextlib.suppress(RuntimeError):
            if not has_store():
                return
            left, deadline = self.shared.add("left", 1), time.monotonic() + PATIENCE
            if self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                while left < self.size and time.monotonic() < deadline:
                    time.sleep(0.05)
                    left = self.shared.add("left", 0)


def start(device: str) -> World:
    """Join the processes that torchrun started (NCCL on CUDA, else Gloo), or run alone.

    Raises:
        InputError: ``device`` is ``"cuda"`` and there is none, or none for this process.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and count == 0:
        raise InputError("device: got cuda, but torch sees no CUDA device; use cpu or auto")
    if count == 0:
        place = torch.device("cpu")
    else:
        if local_rank >= count:
            raise OneRankError(
                f"device: process {local_rank} of this node has no GPU of its own, the node has "
                f"{count}; lower --nproc_per_node or give --device cpu"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if size == 1:
        return World(0, 1, place)
    rank = int(os.environ["RANK"])
    store = torchrun_store(rank, size)
    if store is None:
        store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
    )
    names = [uuid.uuid4().hex]  # the store may contain entries of earlier processes
    dist.broadcast_object_list(names, device=place)
    return World(rank, size, place, dist.PrefixStore(names[0], store))


def torchrun_store(rank: int, size: int) -> dist.Store | None:
    """The store of the torchrun agent, if the processes can use it; else None.

    After a restart, it still contains the addresses of the dead processes. On one node, the restart
    count separates the attempts. On several nodes nothing does, because each node counts its own
    restarts (pytorch/pytorch#135712).
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if size != int(os.environ["LOCAL_WORLD_SIZE"]):
        if rank == 0 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
            print(
                "warning   torchrun's restarts on several nodes may fail or hang; start it with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every node",
                flush=True,
            )
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextlib.contextmanager
def joined(device: str, failure: InputError | None = None) -> Iterator[World]:
    """Join the processes of a run; if an error ends it, exactly one of them reports the cause.

    ``failure`` is an earlier error of this process; it is raised once the others can learn of it.

    Raises:
        InputError: See :func:`start`.
        SaidElsewhere: Another process reports the error.
        RunError: A loader process or another process of the run was lost, or memory ran out.
    """
    if failure is not None and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise failure
    world = start(device)
    try:
        if failure is not None:
            raise failure
        yield world
    except Exception as error:
        cause = explained(error)
        if world.size == 1:
            if cause is error:
                raise
            raise cause from None
        cause = world.attributed(cause)
        if cause is error and not isinstance(cause, REPORTED):
            raise
        # References to the process group would keep the others waiting.
        traceback.clear_frames(error.__traceback__)
        stop()
        world.leave()
        raise cause from None
    finally:
        stop()


def explained(error: Exception) -> Exception:
    """``error``, or a RunError that also says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, REPORTED):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(f"{error.filename}: {error.strerror}")
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(
            f"the GPU's memory is full; lower --batch-size, raise --accumulate, or use "
            f"--grad-checkpointing ({text})"
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY in text):
        return RunError(
            f"memory is full; lower --batch-size, --img-size or --workers ({text[-200:]})"
        )
    if isinstance(error, RuntimeError) and (found := NO_SHARED_MEMORY.search(text)):
        return RunError(
            f"the loader processes have no shared memory left in /dev/shm ({found[0]}); enlarge it "
            "(docker run --shm-size=8g), or lower --workers or --batch-size"
        )
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return RunError(
            f"a loader process was lost, possibly for lack of memory; lower --workers or --batch-size "
            f"({text})"
        )
    return error


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def has_store() -> bool:
    """Whether the store's process still runs; PyTorch logs a traceback if a lost store is used."""
    try:
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(place, timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
