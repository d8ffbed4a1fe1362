"""One process or many: what torchrun says, and the few collectives a run needs."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2tvit.errors import InputError, OneRankError, RunError


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str) -> World:
    """Join the processes that torchrun started (NCCL on CUDA, else Gloo), or be alone.

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
                f"device: process {local_rank} of this node has no GPU of its own, there are "
                f"{count}; lower --nproc_per_node or give --device cpu"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if size == 1:
        return World(0, 1, place)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=torchrun_store(rank, size),
        rank=rank,
        world_size=size,
    )
    return World(rank, size, place)


def torchrun_store(rank: int, size: int) -> dist.Store | None:
    """Where the processes meet, if that is a store of torchrun's own; else None.

    It outlives a restart, with the addresses of the dead processes in it, and restarts are counted
    by each node for itself: on one node the count keeps the attempts apart, on several nothing does
    (pytorch/pytorch#135712).
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


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main(world: World, function: Callable[[], object]) -> object:
    """Call ``function`` on rank 0; every rank returns its result or raises its error."""
    if world.size == 1:
        return function()
    outcome = [None, None]
    if world.is_main:
        try:
            outcome[0] = function()
        except (InputError, RunError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, device=world.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(world: World, value: object) -> list:
    """``value`` of every rank, in order of rank."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(world: World, values: Tensor) -> Tensor:
    """Elementwise sum of ``values`` over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def share_buffers(world: World, model: nn.Module) -> None:
    """Give every rank rank 0's buffers, such as batch norm's statistics, which are the ones kept."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def min_over_ranks(world: World, values: Tensor) -> Tensor:
    """Elementwise minimum of ``values`` over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values
