"""The latent store: a folder of safetensors shards and a manifest that says what their numbers mean.

::

    manifest.json              everything a reader needs to know; sha256 of every shard
    shard-00000.safetensors    latents (n, C or 2C, H, W) fp16 | bf16 | fp32 | uint8, labels (n,) int32
    shard-00001.safetensors    ...

Stores are written once (:mod:`erd_fast.data.writer`), into a hidden folder that is renamed when whole, and never
changed. No pickle anywhere.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.data.manifest import Shard, read_manifest
from erd_fast.errors import DataError

_STORED_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "U8": "uint8", "I32": "int32"}
_NUMPY_TYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "uint8": "u1", "int32": "<i4"}
_HASH_AT_OPEN = 1 << 30  # bytes; larger stores are hashed on request, sizes and headers are always checked


class LatentStore:
    """A store on disk, opened for reading. Opening checks the manifest, every shard's header and size, and the labels.

    Args:
        path: the store's folder.
        verify: compare every shard with its sha256; None does so for stores of up to 1 GiB.

    Raises:
        DataError: the folder is no store, or a shard is missing, truncated, altered, or not of the manifest's form.
    """

    def __init__(self, path: str | Path, verify: bool | None = None):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._first_rows = np.cumsum([0, *(shard.count for shard in self.manifest.shards)])
        mapped = [self._map_shard(shard) for shard in self.manifest.shards]
        self._latents = [latents for latents, _ in mapped]
        self._rows = [_bytes_of_rows(latents) for latents in self._latents]
        self.labels = torch.cat([labels for _, labels in mapped]).long()
        self._check_labels()
        total = sum(shard.bytes for shard in self.manifest.shards)
        if verify if verify is not None else total <= _HASH_AT_OPEN:
            self.verify()

    def __len__(self) -> int:
        return self.manifest.count

    def __reduce__(self) -> tuple[type["LatentStore"], tuple[Path, bool]]:
        """Another process opens the folder itself; rows go nowhere."""
        return LatentStore, (self.path.absolute(), False)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: a hash of the manifest without names and origins."""
        content = dataclasses.asdict(self.manifest)
        meaning = {key: content[key] for key in ("kind", "shape", "dtype", "scale", "shift", "flip", "num_classes")}
        sums = [shard.sha256 for shard in self.manifest.shards]
        return hashlib.sha256(json.dumps([meaning, sums]).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The manifest as lines for a person; fields that say nothing are left out."""
        manifest = self.manifest
        shape = " x ".join(map(str, manifest.shape))
        lines = {
            "samples": f"{manifest.count:,}",
            "kind": f"{manifest.kind}, {manifest.dtype}, {shape}",
            "classes": f"{manifest.num_classes:,}" if manifest.num_classes else "none",
            "flip": manifest.flip,
            "crop": manifest.crop,
            "scale": ", ".join(map(str, manifest.scale)),
            "shift": ", ".join(map(str, manifest.shift)),
            "vae": manifest.vae,
            "vae source": manifest.vae_source,
            "shards": f"{len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards):,} bytes",
            "fingerprint": self.fingerprint,
        }
        return "\n".join([str(self.path), *(f"  {name:<13}{value}" for name, value in lines.items() if value)])

    def verify(self) -> None:
        """Compare every shard with its sha256. Raises DataError naming the first that differs."""
        for shard in self.manifest.shards:
            found = sha256_of(self.path / shard.file)
            if found != shard.sha256:
                raise DataError(
                    f"{self.path / shard.file} was altered: sha256 {found[:12]}..., the manifest says "
                    f"{shard.sha256[:12]}...; restore the file or make the store again"
                )

    def gather(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Stored rows of ``index`` ((N,) int64), copied from the mapped files: (N, C or 2C, H, W), which is ``out``, if
        given: contiguous, of the store's dtype."""
        first = self._latents[0]
        rows = torch.empty((len(index), *first.shape[1:]), dtype=first.dtype) if out is None else out
        # NumPy copies whole rows, and on the calling thread alone: PyTorch's threads would take the cores of a step.
        target, wanted = _bytes_of_rows(rows), index.numpy()
        shard_of = np.searchsorted(self._first_rows, wanted, side="right") - 1
        for number in np.unique(shard_of):
            places = np.flatnonzero(shard_of == number)
            target[places] = self._rows[number][wanted[places] - self._first_rows[number]]
        return rows

    def shards(self) -> Iterator[Tensor]:
        """The mapped latents of each shard in turn."""
        return iter(self._latents)

    def _map_shard(self, shard: Shard) -> tuple[Tensor, Tensor]:
        file = self.path / shard.file
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{file} is missing; the manifest lists it") from None
        if size != shard.bytes:
            raise DataError(f"{file} is truncated or altered: {size} bytes, the manifest says {shard.bytes}")
        manifest = self.manifest
        latents = _map_tensor(
            file, "latents", manifest.dtype, (shard.count, manifest.channels_stored, *manifest.shape[1:])
        )
        return latents, _map_tensor(file, "labels", "int32", (shard.count,))

    def _check_labels(self) -> None:
        limit = self.manifest.num_classes
        wrong = (self.labels < 0) | (self.labels >= max(limit, 1))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            allowed = f"0 to {limit - 1}" if limit else "0 alone, the store has no classes"
            raise DataError(f"{self.path}: label {int(self.labels[row])} of sample {row}; allowed {allowed}")


def _map_tensor(file: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the file's pages: nothing is read until it is touched, and processes share the page cache."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        entry = header[name]
        found, stored, (begin, end) = tuple(entry["shape"]), _STORED_NAMES.get(entry["dtype"]), entry["data_offsets"]
        if found != shape or stored != dtype:
            raise DataError(f"{file}: {name}: given {entry['dtype']} {found}, the manifest says {dtype} {shape}")
        # Mode "c" maps privately: torch wants memory it may write to, and nothing may reach the file.
        array = np.memmap(file, _NUMPY_TYPES[dtype], mode="c", offset=8 + length + begin, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, OverflowError) as error:
        raise DataError(f"{file} has no readable tensor {name!r}: the shard was altered ({error!r})") from error
    if array.nbytes != end - begin:
        raise DataError(f"{file}: {name}: {end - begin} bytes for {dtype} {shape}: the shard was altered")
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _bytes_of_rows(latents: Tensor) -> NDArray[np.uint8]:
    """The same memory as (n, bytes of a row)."""
    size = latents.shape[1:].numel() * latents.element_size()
    return latents.view(torch.uint8).view(len(latents), size).numpy()


def sha256_of(file: Path) -> str:
    """Hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
