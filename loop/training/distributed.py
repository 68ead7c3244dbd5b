"""Several processes that train one model together, as `torchrun` starts them; a single process is a group of one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from loop.errors import ConfigError

PATIENCE = timedelta(minutes=30)
"""How long the others wait for one that validates; one that died is noticed by `torchrun`, which ends all."""


@dataclass(frozen=True)
class Group:
    """Which of the processes this one is: `rank` of `world`, on `device`. All must call a method at the same point."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process logs, validates and stores; the others only compute."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, src=0)
        return float(shared.item())

    def mean(self, value: Tensor) -> Tensor:
        """The mean of all processes' values, in every process; `value`, a float tensor on the device, may change."""
        if self.world == 1:
            return value
        distributed.all_reduce(value)
        return value / self.world

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors, on the device, with the first process's."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group of this process, left again at the end; inside another group, that one.

    `torchrun` says in the environment how many processes there are (WORLD_SIZE, RANK, LOCAL_RANK). On GPUs each takes
    the GPU of its local rank and they speak through NCCL, on a CPU through gloo. Processes can meet only once: to train
    several models one after the other, open the group around them.

    Raises:
        ConfigError: the environment is not as `torchrun` leaves it, or a process has no GPU of its own.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group(0, 1, device)
        return
    if "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={world} is set without RANK; start with torchrun, or unset WORLD_SIZE")
    group = Group(int(os.environ["RANK"]), world, _own_device(device))
    if distributed.is_initialized():
        yield group
        return
    distributed.init_process_group("nccl" if group.device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        distributed.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this process's local rank, made the current one; a CPU is for all."""
    if device.type != "cuda":
        return device
    place, found = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if place >= found:
        raise ConfigError(
            f"process {place} of this machine has no GPU of its own, torch sees {found}; start torchrun with "
            f"--nproc_per_node {found}, or set train.device: cpu"
        )
    own = torch.device("cuda", place)
    torch.cuda.set_device(own)
    return own
