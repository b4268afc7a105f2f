"""Readers of a store: one protocol, the same batches for one seed whichever reads them."""

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from erd_fast.data.store import LatentStore

Loader = Literal["auto", "resident", "mmap"]
_LOOK_AHEAD = 2


class Batch(NamedTuple):
    """What a reader hands to a step."""

    latents: Tensor  # stored rows on the device: all of them if ``resident``, else those of this batch
    labels: Tensor  # int64, in the order of ``latents``
    resident: bool  # True: the step picks rows by the drawn sample index


class Reader(Protocol):
    """A source of batches. ``plan(i)`` gives the (N,) sample indices of batch i as a CPU tensor."""

    name: str

    def batches(self, plan: Callable[[int], Tensor], start: int) -> Generator[Batch, None, None]:
        """Batches ``start``, ``start + 1``, ... without end."""
        ...


class ResidentReader:
    """A full copy on the device; a batch costs nothing here, ``q_sample`` reads the rows it needs."""

    name = "resident"

    def __init__(self, store: LatentStore, device: torch.device):
        first = next(store.shards())
        latents = torch.empty((len(store), *first.shape[1:]), dtype=first.dtype, device=device)
        filled = 0
        for shard in store.shards():  # one by one: the whole store is on the device once, not twice
            latents[filled : filled + len(shard)].copy_(shard)
            filled += len(shard)
        self._batch = Batch(latents, store.labels.to(device), True)

    def batches(self, plan: Callable[[int], Tensor], start: int) -> Generator[Batch, None, None]:
        while True:
            yield self._batch


class MmapReader:
    """Rows copied from the mapped shards by a thread that looks ahead; one copy of the data a node, in the page cache.

    On a GPU the rows go through pinned memory and a copy stream of their own, so copies overlap the step.
    """

    name = "mmap"

    def __init__(self, store: LatentStore, device: torch.device):
        self._store, self._device = store, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, plan: Callable[[int], Tensor], start: int) -> Generator[Batch, None, None]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mmap-reader") as pool:
            ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
            number = start
            try:
                while True:
                    while len(ahead) <= _LOOK_AHEAD:
                        ahead.append(pool.submit(self._read, plan, number))
                        number += 1
                    yield self._to_device(*ahead.popleft().result())
            finally:
                for future in ahead:
                    future.cancel()

    def _read(self, plan: Callable[[int], Tensor], number: int) -> tuple[Tensor, Tensor]:
        index = plan(number)
        latents, labels = self._store.gather(index), self._store.labels[index]
        return (latents.pin_memory(), labels.pin_memory()) if self._stream else (latents, labels)

    def _to_device(self, latents: Tensor, labels: Tensor) -> Batch:
        if self._stream is None:
            return Batch(latents, labels, False)
        with torch.cuda.stream(self._stream):
            moved = [tensor.to(self._device, non_blocking=True) for tensor in (latents, labels)]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(current)
        return Batch(moved[0], moved[1], False)


def open_reader(store: LatentStore, loader: Loader, device: torch.device) -> Reader:
    """The reader called ``loader``; ``auto`` is resident if a copy takes at most half of the free memory, else
    mmap."""
    if loader == "auto":
        size = sum(shard.nbytes for shard in store.shards())
        loader = "resident" if 2 * size <= _free_bytes(device) else "mmap"
    return ResidentReader(store, device) if loader == "resident" else MmapReader(store, device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
