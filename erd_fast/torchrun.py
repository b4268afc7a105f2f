"""What torchrun tells a process of its place among others; without it there is one process."""

import os
from typing import NamedTuple

import torch

from erd_fast.errors import ConfigError


class Place(NamedTuple):
    """Process ``rank`` of ``size``, and ``local_rank`` of ``local_size`` on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def own_place() -> Place:
    """Of this process."""
    wanted = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Place(*(int(os.environ.get(name, alone)) for name, alone in wanted.items()))


def own_device() -> torch.device:
    """The GPU of this process, from now on the current one; the CPU where there are none.

    Raises:
        ConfigError: there are more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _, _, local_rank, local_size = own_place()
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"nproc-per-node: given {local_size}, allowed up to {torch.cuda.device_count()}, the GPUs of this machine"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
