"""LightningDiT's shards (arXiv 2501.01423).

::

    latents_rank00_shard000.safetensors    latents, latents_flip (n, C, H, W); labels (n,)
    latents_stats.pt                       mean, std (1, C, 1, 1), a torch pickle
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from erd_fast.data.foreign import reading
from erd_fast.data.formats.source import ROWS_AT_ONCE, Batches, ImportOptions, Source, as_labels, warn_of_gaps
from erd_fast.data.manifest import ADM_CROP
from erd_fast.errors import ConfigError, DataError

_SHARD = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
_VIEWS = ("latents", "latents_flip")
_STATISTICS = "latents_stats.pt"


class _Scaling(NamedTuple):
    scale: tuple[float, ...]
    shift: tuple[float, ...]


def open_lightningdit(src: Path, options: ImportOptions) -> Source:
    """Samples, and of each shard the mirror images after them; x0 = (z - mean) / std * multiplier.

    mean and std come from latents_stats.pt, a pickle; ``options.scale`` and ``shift`` take their place.
    """
    files = _shard_files(src)
    scaling = _scaling(src, options)
    counts = [_count(file) for file in files]
    return Source(
        batches=_batches(files),
        kind="sample",
        count=len(_VIEWS) * sum(counts),
        scale=scaling.scale,
        shift=scaling.shift,
        crop=ADM_CROP,
        flip="stored",
    )


def _shard_files(src: Path) -> list[Path]:
    """In LightningDiT's order, by name."""
    found = [(file, match) for file in sorted(src.glob("*.safetensors")) if (match := _SHARD.fullmatch(file.name))]
    if not found:
        raise DataError(f"{src} has no files latents_rank00_shard000.safetensors ...")
    shards: dict[int, list[int]] = {}
    for _, match in found:
        shards.setdefault(int(match[1]), []).append(int(match[2]))
    warn_of_gaps(shards, f"{src}/latents_rank*")
    for rank, numbers in shards.items():
        warn_of_gaps(numbers, f"{src}/latents_rank{rank:02d}_shard*")
    return [file for file, _ in found]


def _scaling(src: Path, options: ImportOptions) -> _Scaling:
    if options.scale or options.shift:
        if options.multiplier is not None:
            raise ConfigError(
                "multiplier: given with scale or shift, allowed with latents_stats.pt; multiply scale by it"
            )
        return _Scaling((), ())
    file = src / _STATISTICS
    if not file.is_file():
        raise DataError(f"{src} has no {_STATISTICS}; give --scale and --shift")
    if not options.allow_pickle:
        raise ConfigError(
            f"allow_pickle: {file} is a pickle, and one may hold more than numbers; --allow-pickle takes mean and std "
            "out of it, or give --scale and --shift"
        )
    multiplier = 1.0 if options.multiplier is None else options.multiplier
    if not 0 < multiplier < math.inf:
        raise ConfigError(f"multiplier: given {multiplier}, allowed a finite number above 0")
    mean, std = _statistics(file)
    return _Scaling(tuple(multiplier / s for s in std), tuple(mean))


def _statistics(file: Path) -> tuple[list[float], list[float]]:
    """mean, std of the channels."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = (content[name].double().flatten().tolist() for name in ("mean", "std"))
    except Exception as error:  # PyTorch's own is a page, and advises to run what is in the file
        raise DataError(f"{file} is damaged, or holds something else than tensors mean and std") from error
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std):
        raise DataError(f"{file}: given mean {mean} and std {std}, allowed finite numbers, as many, std above 0")
    return mean, std


def _count(file: Path) -> int:
    """Samples of a shard, each of which has two views."""
    with reading(file, SafetensorError), safe_open(file, "pt") as shard:
        there = set(shard.keys())
        for name in (*_VIEWS, "labels"):
            if name not in there:
                raise DataError(f"{file} has no {name}; it has {', '.join(sorted(there)) or 'nothing'}")
        shapes = [tuple(shard.get_slice(name).get_shape()) for name in (*_VIEWS, "labels")]
    latents, flipped, labels = shapes
    if len(latents) != 4 or flipped != latents or labels != latents[:1]:
        raise DataError(
            f"{file}: given latents {latents}, latents_flip {flipped} and labels {labels}, "
            "allowed (n, C, H, W) twice and (n,)"
        )
    return latents[0]


def _batches(files: Sequence[Path]) -> Batches:
    for file in files:
        with reading(file, SafetensorError), safe_open(file, "pt") as shard:
            labels = as_labels(shard.get_tensor("labels").numpy(), file)
            for view in _VIEWS:
                rows = shard.get_slice(view)
                for first in range(0, len(labels), ROWS_AT_ONCE):
                    latents = rows[first : first + ROWS_AT_ONCE]
                    if not latents.is_floating_point():
                        raise DataError(f"{file}: given {view} {latents.dtype}, allowed floats")
                    # NumPy has no bfloat16
                    yield np.asarray(latents.float()), labels[first : first + ROWS_AT_ONCE]
