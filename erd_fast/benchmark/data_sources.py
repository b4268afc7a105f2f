"""What `erd-fast bench data` reads: the same random latents as a store of ours, as NumPy files, and as HDF5.

All lie in one temporary folder, written just before they are read, so that they are in the page cache.
"""

import dataclasses
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from erd_fast.benchmark.op_cases import SHAPE
from erd_fast.data import Batch, LatentStore, write_store
from erd_fast.extras import load

CLASSES = 1000
WORKERS = max(2, min(8, os.cpu_count() or 1))
"""Processes of a DataLoader."""
_SHARD = 4096


def write_latents(folder: Path, count: int) -> LatentStore:
    """A store of ``count`` latents (mean, std) of (4, 32, 32) in fp16, in several shards."""
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, count, _SHARD):
            size = min(_SHARD, count - first)
            latents = torch.randn(size, 2 * SHAPE[0], *SHAPE[1:], generator=generator).half()
            yield latents, torch.randint(CLASSES, (size,), generator=generator)

    return write_store(folder, batches(), kind="mean_std", num_classes=CLASSES, shard_size=_SHARD)


@dataclasses.dataclass(frozen=True)
class NpyFiles(Dataset[Any]):
    """A NumPy file for each latent, as fast-DiT has them, but fp16; the labels are in memory."""

    folder: Path
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.load(self.folder / f"{number:06d}.npy")), self.labels[number]


def write_npy(folder: Path, store: LatentStore, count: int) -> NpyFiles:
    """Of the first ``count`` latents."""
    folder.mkdir()
    for first, rows in _pieces(store, count):
        for number, row in enumerate(rows.numpy(), first):
            np.save(folder / f"{number:06d}.npy", row)
    return NpyFiles(folder, store.labels[:count])


@dataclasses.dataclass(frozen=True)
class Hdf5Samples(Dataset[Any]):
    """One HDF5 file of float32, opened for each sample, as the published code of ERD reads it."""

    file: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        import h5py

        with h5py.File(self.file, "r") as file:
            return torch.from_numpy(file["train_latents"][number]), file["train_labels"][number]


def write_hdf5(file: Path, store: LatentStore, count: int) -> Hdf5Samples:
    """Of the first ``count`` latents. Raises ConfigError where h5py is not installed."""
    h5py = load("h5py", "formats", "hdf5")
    with h5py.File(file, "w") as written:
        shape = (count, *next(store.shards()).shape[1:])
        latents = written.create_dataset("train_latents", shape, "f4")
        for first, rows in _pieces(store, count):
            latents[first : first + len(rows)] = rows.float().numpy()
        written["train_labels"] = store.labels[:count].numpy().astype(np.uint16)
    return Hdf5Samples(file, count)


def _pieces(store: LatentStore, count: int) -> Iterator[tuple[int, Tensor]]:
    for numbers in torch.arange(count).split(_SHARD):
        yield int(numbers[0]), store.gather(numbers)


def loaded(dataset: Dataset[Any], batch_size: int, device: torch.device) -> Generator[Batch, None, None]:
    """Batches without end by a DataLoader, whose processes are kept from one epoch to the next."""
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
        pin_memory=on_gpu,
        persistent_workers=True,
    )
    while True:
        for latents, labels in loader:
            yield Batch(latents.to(device, non_blocking=True), labels.to(device, non_blocking=True), False)
