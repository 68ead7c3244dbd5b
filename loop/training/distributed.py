"""Several processes that train one model together, as `torchrun` starts them; a single process is a group of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Group:
    """Which of the processes this one is: `rank` of `world`, on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process logs, validates and stores; the others only compute."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The first process's value, in every process; all must call it at the same point."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, src=0)
        return float(shared.item())


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group of this process, left again at the end.

    `torchrun` says in the environment how many processes there are (WORLD_SIZE, RANK, LOCAL_RANK). On GPUs each takes
    the GPU of its local rank and they speak through NCCL, on a CPU through gloo.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group(0, 1, device)
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Group(rank, world, device)
    finally:
        distributed.destroy_process_group()
