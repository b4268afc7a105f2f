"""The HDF5 file of the official ERD code (arXiv 2605.10790).

::

    train_latents (N, 8, 32, 32) float32    mean and std of the posterior
    train_labels  (N,) uint16
    val_latents, val_labels                 likewise; pixels may be there too and are not read
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.foreign import reading
from erd_fast.data.formats.source import ROWS_AT_ONCE, SD_SCALE, Batches, ImportOptions, Source, as_floats, as_labels
from erd_fast.data.manifest import ADM_CROP
from erd_fast.errors import DataError
from erd_fast.extras import load


def open_erd_hdf5(src: Path, options: ImportOptions) -> Source:
    """Mean and std, scaled by 0.18215, of the part ``options.split``."""
    h5py = load("h5py", "formats", "erd-hdf5")
    if not src.is_file():
        raise DataError(f"{src}: given a folder, allowed one HDF5 file")
    latents_name, labels_name = f"{options.split}_latents", f"{options.split}_labels"
    with _opened(h5py, src) as file:
        latents, labels = (_array(h5py, file, name, src) for name in (latents_name, labels_name))
        if len(latents.shape) != 4 or labels.shape != latents.shape[:1]:
            raise DataError(
                f"{src}: given {latents_name} {latents.shape} and {labels_name} {labels.shape}, "
                "allowed (N, 8, H, W) and (N,)"
            )
        classes = as_labels(np.asarray(labels), f"{src}: {labels_name}")
    return Source(
        batches=_batches(h5py, src, latents_name, classes),
        kind="mean_std",
        count=len(classes),
        scale=(SD_SCALE,),
        crop=ADM_CROP,
    )


@contextlib.contextmanager
def _opened(h5py: ModuleType, src: Path) -> Iterator[Any]:
    with reading(f"{src} as HDF5", RuntimeError), h5py.File(src, "r") as file:
        yield file


def _array(h5py: ModuleType, file: Any, name: str, src: Path) -> Any:
    if not isinstance(file.get(name), h5py.Dataset):
        raise DataError(f"{src} has no array {name}; it has {', '.join(file) or 'nothing'}")
    return file[name]


def _batches(h5py: ModuleType, src: Path, name: str, classes: NDArray[Any]) -> Batches:
    with _opened(h5py, src) as file:
        latents = file[name]
        chunk = latents.chunks[0] if latents.chunks else 1
        step = chunk * max(1, ROWS_AT_ONCE // chunk)  # whole chunks: a compressed one is unpacked once
        for first in range(0, len(classes), step):
            rows = as_floats(latents[first : first + step], f"{src}: {name}")
            yield rows, classes[first : first + step]
