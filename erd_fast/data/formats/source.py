"""What importers share: what they may be told, what they hand over, and how they word what they refuse."""

import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.manifest import Flip
from erd_fast.errors import ConfigError, DataError
from erd_fast.latents import FloatKind, LatentKind

ROWS_AT_ONCE = 256
SD_SCALE = 0.18215
"""What the latents of Stable Diffusion's autoencoder are multiplied by (arXiv 2112.10752)."""
_THREADS = 8  # for files of one image: mostly they wait for the disk
Batches = Generator[tuple[NDArray[Any], NDArray[Any]], None, None]
_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What a data set does not say about itself, or says otherwise. A format refuses what it has no use for."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the latents that are written."""
    num_classes: int | None = None
    """Labels lie below it; default the largest label and one."""
    vae: str | None = None
    """Autoencoder that made the latents, if it is not the one that the format is known for: a folder or an ID of the
    Hugging Face hub, by which samples can be decoded later, or any other name."""
    scale: tuple[float, ...] = ()
    """x0 = (z - shift) * scale: one number, or one for each channel, in the place of the format's."""
    shift: tuple[float, ...] = ()
    """Likewise."""
    allow_pickle: bool = False
    """uvit, maskdit-webdataset, lightningdit: take the arrays out of their pickles, and nothing else."""
    split: Literal["train", "val"] = "train"
    """erd-hdf5, maskdit-lmdb: which part."""
    kind: FloatKind | None = None
    """numpy: what floats are. Bytes are pixels."""
    flip: Flip | None = None
    """numpy, maskdit-webdataset, images: are mirrored copies stored, or pixels to be mirrored in training? Default
    none; of images mirror."""
    labels: Path | None = None
    """numpy: .npy file of the labels."""
    multiplier: float | None = None
    """lightningdit: latent_multiplier of its configuration; default 1."""
    size: int = 64
    """images: pixels of a side."""
    partition: Path | None = None
    """celeba: list_eval_partition.txt; import its training images alone."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that is ready to be read, once."""

    batches: Batches
    """Latents (n, C or 2C, H, W) of any float, or uint8 pixels, and labels (n,) of any integer. Closing it closes the
    data set."""
    kind: LatentKind
    count: int | None
    """Samples; None where only reading all tells."""
    num_classes: int | None = None
    """0: the labels say nothing. None: as many as the labels need."""
    scale: tuple[float, ...] = ()
    """As in the manifest, or one number for all channels."""
    shift: tuple[float, ...] = ()
    vae: str = ""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    crop: str = "unknown"
    flip: Flip = "none"
    class_names: tuple[str, ...] = ()


def need_pickles(options: ImportOptions, what: str) -> None:
    """Raises ConfigError unless pickles may be read."""
    if not options.allow_pickle:
        raise ConfigError(
            f"allow_pickle: {what}, and a pickle may hold more than numbers; --allow-pickle takes numbers out of it"
        )


def as_floats(array: NDArray[Any], name: object) -> NDArray[Any]:
    if array.dtype.kind != "f":
        raise DataError(f"{name}: given latents {array.dtype}, allowed floats")
    return array


def as_labels(array: NDArray[Any], name: object) -> NDArray[Any]:
    if array.dtype.kind not in "iu":
        raise DataError(f"{name}: given labels {array.dtype}, allowed whole numbers")
    return array


def stacked(rows: Sequence[NDArray[Any]], names: Sequence[object], example: tuple[int, ...]) -> NDArray[Any]:
    """Rows of one shape, (n, ...). Raises DataError naming the first that is not of shape ``example``."""
    for row, name in zip(rows, names, strict=True):
        if row.shape != example:
            raise DataError(f"{name}: given {_times(row.shape)} numbers, allowed {_times(example)} as in the others")
    return np.stack(rows)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def in_batches(
    read: Callable[[_Item], _Read], items: Sequence[_Item], size: int = ROWS_AT_ONCE
) -> Iterator[tuple[Sequence[_Item], list[_Read]]]:
    """``size`` items after another with what ``read`` makes of them; several files are read at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(items), size):
            part = items[first : first + size]
            yield part, list(pool.map(read, part))


def warn_of_gaps(numbers: Iterable[int], files: str) -> None:
    """Warn if the numbers in the names of ``files`` are not 0, 1, 2 ... without a gap."""
    there = sorted(set(numbers))
    missing = next((wanted for wanted, found in enumerate(there) if wanted != found), None)
    if missing is not None:
        warnings.warn(
            f"{files}: {len(there):,} of them, numbered up to {there[-1]}, and {missing} is the first that is missing: "
            "some were lost, or are still to be written",
            stacklevel=2,
        )
