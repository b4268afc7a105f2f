"""Readers of a store: one protocol, the same batches for one seed whichever reads them."""

import os
from collections.abc import Callable, Generator
from typing import Literal

import torch
from torch import Tensor

from erd_fast.data.dali import DaliReader
from erd_fast.data.reading import Batch, Made, Plan, Reader, read_ahead
from erd_fast.data.store import LatentStore

Loader = Literal["auto", "resident", "mmap", "dali"]


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

    def batches(self, plan: Plan, start: int) -> Generator[Batch, None, None]:
        while True:
            yield self._batch


class MmapReader:
    """Rows copied from the mapped shards by a thread that looks ahead; one copy of the data a node, in the page cache.

    On a GPU the thread puts them into pinned memory and copies them from there on a stream of its own, so that copies
    overlap the step.
    """

    name = "mmap"

    def __init__(self, store: LatentStore, device: torch.device):
        self._store, self._device = store, device

    def batches(self, plan: Plan, start: int) -> Generator[Batch, None, None]:
        if self._device.type == "cpu":
            return read_ahead(lambda number: self._read(plan(number)), start, "mmap-reader")
        stream = torch.cuda.Stream(self._device)
        stages = [_PinnedStage(self._store, stream) for _ in range(2)]  # one is filled while the other is copied
        return read_ahead(lambda number: stages[number % 2].read(plan(number)), start, "mmap-reader")

    def _read(self, index: Tensor) -> Made:
        return Made(Batch(self._store.gather(index), self._store.labels[index], False), None)


class _PinnedStage:
    """Pinned memory for the rows of a batch on their way to a GPU, used again and again: making it costs too much."""

    def __init__(self, store: LatentStore, stream: torch.cuda.Stream):
        self._store, self._stream = store, stream
        self._copied = torch.cuda.Event(blocking=True)  # which a thread awaits without using a core
        self._latents = self._labels = torch.empty(0)

    def read(self, index: Tensor) -> Made:
        self._copied.synchronize()  # what was here before
        if len(self._latents) != len(index):
            shard = next(self._store.shards())
            self._latents = torch.empty((len(index), *shard.shape[1:]), dtype=shard.dtype, pin_memory=True)
            self._labels = torch.empty(len(index), dtype=torch.int64, pin_memory=True)
        self._store.gather(index, self._latents)
        torch.index_select(self._store.labels, 0, index, out=self._labels)
        with torch.cuda.stream(self._stream):
            latents, labels = (tensor.cuda(non_blocking=True) for tensor in (self._latents, self._labels))
            self._copied.record()
            return Made(Batch(latents, labels, False), self._stream.record_event())


_READERS: dict[str, Callable[[LatentStore, torch.device], Reader]] = {
    "resident": ResidentReader,
    "mmap": MmapReader,
    "dali": DaliReader,
}

_ROOM = {"cuda": 0.9, "cpu": 0.5}
"""Part of the free memory that a copy may take. Buckets of reductions and pages of files want some too."""


def open_reader(store: LatentStore, loader: Loader, device: torch.device, needed: int = 0) -> Reader:
    """The reader called ``loader``. ``auto`` is resident if a copy takes at most 90 % of a GPU's memory, or half of a
    CPU's, that is free beside the ``needed`` bytes of a step; else mmap, which is faster than dali (docs/benchmarks.md,
    "Reading latents").

    Raises:
        ConfigError: dali, and NVIDIA DALI is not installed.
    """
    if loader == "auto":
        size = sum(shard.nbytes for shard in store.shards())
        room = _ROOM[device.type] * (_free_bytes(device) - needed)
        loader = "resident" if size <= room else "mmap"
    return _READERS[loader](store, device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
