"""From a source to a store: dtypes, what the user says instead of the format, how far it is."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.data.formats.source import ImportOptions, Source
from erd_fast.data.manifest import STORED_DTYPES
from erd_fast.data.store import LatentStore
from erd_fast.data.writer import SHARD_SIZE, write_store
from erd_fast.errors import ConfigError, DataError
from erd_fast.latents import has_posterior, latent_channels
from erd_fast.progress import Progress

_SHARD_BYTES = 1 << 29  # a shard is held in memory


def write_source(source: Source, src: Path, dst: Path, options: ImportOptions) -> LatentStore:
    """Write all of ``source``, which was opened on ``src``, as a store ``dst``.

    Raises:
        DataError: it is empty or damaged, or its numbers do not fit; nothing is left then.
        ConfigError: the options do not fit it.
    """
    print(f"importing {'' if source.count is None else f'{source.count:,} samples of '}{src}", flush=True)
    with contextlib.closing(source.batches), Progress("importing", "sample", source.count) as progress:
        return _write(source, src, dst, options, progress)


def _write(source: Source, src: Path, dst: Path, options: ImportOptions, progress: Progress) -> LatentStore:
    first = next(source.batches, None)
    if first is None or not first[0].size:
        raise DataError(f"{src} has no samples, allowed at least one")
    _check_shape(first[0], source, src)
    if source.num_classes == 0 and options.num_classes is not None:
        raise ConfigError(f"num_classes: given {options.num_classes}, but {src} has no labels")
    described = _described(source, first[0].shape[1], src, options)
    dtype = torch.uint8 if source.kind == "pixels" else STORED_DTYPES[options.dtype]
    row = math.prod(first[0].shape[1:]) * dtype.itemsize
    return write_store(
        dst,
        _counted(_tensors(itertools.chain([first], source.batches), dtype), progress),
        kind=source.kind,
        num_classes=source.num_classes if options.num_classes is None else options.num_classes,
        shard_size=max(1, min(SHARD_SIZE, _SHARD_BYTES // row)),
        source=str(src),
        **described,
    )


def _check_shape(latents: NDArray[Any], source: Source, src: Path) -> None:
    if has_posterior(source.kind) and latents.shape[1] % 2:
        raise DataError(f"{src}: given {latents.shape[1]} channels, allowed an even number for {source.kind}")


def _described(source: Source, stored: int, src: Path, options: ImportOptions) -> dict[str, Any]:
    """Fields of the manifest."""
    vae = source.vae if options.vae is None else options.vae
    fields: dict[str, Any] = {
        "vae": vae,
        "vae_source": _source_of(vae),
        "pixel_range": source.pixel_range,
        "crop": source.crop,
        "flip": source.flip,
        "class_names": source.class_names,
    }
    if source.kind == "pixels":
        for name in ("dtype", "scale", "shift", "vae"):
            if getattr(options, name) != getattr(ImportOptions, name):
                raise ConfigError(f"{name}: given {getattr(options, name)}, but {src} holds pixels")
        return fields
    if source.flip == "mirror":
        raise ConfigError(f"flip: given mirror, allowed for pixels; {src} holds latents")
    channels = latent_channels(source.kind, stored)
    return fields | {name: _per_channel(name, channels, source, src, options) for name in ("scale", "shift")}


def _source_of(vae: str) -> str:
    """Where the autoencoder is, if its name is a folder or an ID of the hub."""
    if os.path.isdir(vae):
        return os.path.abspath(vae)
    return vae if "/" in vae else ""


def _per_channel(name: str, channels: int, source: Source, src: Path, options: ImportOptions) -> tuple[float, ...]:
    given, own = getattr(options, name), getattr(source, name)
    if not all(math.isfinite(value) and (value or name == "shift") for value in given):
        raise ConfigError(f"{name}: given {given}, allowed finite numbers{', not 0' if name == 'scale' else ''}")
    chosen = given or own
    if len(chosen) == 1:
        return chosen * channels
    if len(chosen) not in (0, channels):
        if given:
            raise ConfigError(f"{name}: given {len(given)} numbers, allowed 1 or {channels}, one for each channel")
        raise DataError(f"{src} has {channels} channels, its format {len(own)}: give --scale and --shift")
    return chosen


def _tensors(
    batches: Iterable[tuple[NDArray[Any], NDArray[Any]]], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    for latents, labels in batches:
        if dtype == torch.uint8:
            rows = torch.from_numpy(np.array(latents))
        else:
            with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, and refused as such
                rows = torch.from_numpy(latents.astype(np.float32, order="C")).to(dtype)
        yield rows, torch.from_numpy(labels.astype(np.int64))


def _counted(batches: Iterator[tuple[Tensor, Tensor]], progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    for latents, labels in batches:
        yield latents, labels
        progress.count(len(latents))
