"""Folders or zip files of one .npy file an image, with their labels in dataset.json: EDM2's and REPA's.

::

    dataset.json                             {"labels": [["00000/img-mean-std-00000000.npy", 7], ...]}, or null
    00000/img-mean-std-00000000.npy          (8, H, W) float32, mean and std of the posterior

The two look alike and are not: EDM2 fed the autoencoder pixels of 0 to 1, for which it was not made, and REPA those of
-1 to 1.
"""

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.foreign import DATASET_JSON, ZIP_ERRORS, check_entries, labels_of_json, reading
from erd_fast.data.formats.npy import read_npy
from erd_fast.data.formats.source import SD_SCALE, Batches, ImportOptions, Source, as_floats, in_batches, stacked
from erd_fast.errors import DataError

_SD_MSE = "stabilityai/sd-vae-ft-mse"
_EDM2_MEANS = (5.81, 3.25, 0.12, -2.15)
_EDM2_STDS = (4.17, 4.62, 3.71, 3.28)


class _Files(NamedTuple):
    """A folder or a zip file."""

    names: list[str]
    """Of all files, with /."""
    read: Callable[[str], bytes]
    close: Callable[[], None]


def open_edm2(src: Path, options: ImportOptions) -> Source:
    """Means and stds of EDM2 (arXiv 2312.02696), normalised by its means and stds for each channel.

    EDM2 then halves the latents, as its noise levels are made for a std of 0.5; processes here are made for 1.
    """
    return _opened(
        src,
        shift=_EDM2_MEANS,
        scale=tuple(1 / std for std in _EDM2_STDS),
        pixel_range=(0.0, 1.0),
    )


def open_repa(src: Path, options: ImportOptions) -> Source:
    """Means and stds of REPA (arXiv 2410.06940), scaled by 0.18215; ``src`` may be the folder around vae-sd/."""
    inner = src / "vae-sd"
    return _opened(inner if inner.is_dir() else src, scale=(SD_SCALE,))


def _opened(src: Path, **meaning: Any) -> Source:
    files = _folder(src) if src.is_dir() else _zip(src)
    try:
        names, labels = _names_and_labels(files, src)
    except DataError:
        files.close()
        raise
    return Source(
        batches=_batches(files, names, labels, src),
        kind="mean_std",
        count=len(names),
        num_classes=0 if labels is None else None,
        vae=_SD_MSE,
        **meaning,
    )


def _folder(src: Path) -> _Files:
    def read(name: str) -> bytes:
        with reading(f"{src}/{name}"), open(f"{src}/{name}", "rb") as stream:
            return stream.read()

    names = [f"{parent}/{name}" for parent, _, there in os.walk(src) for name in there]
    return _Files([name.removeprefix(f"{src}/") for name in names], read, lambda: None)


def _zip(src: Path) -> _Files:
    with reading(f"{src} as a folder or zip file", *ZIP_ERRORS):
        archive = zipfile.ZipFile(src)

    def read(name: str) -> bytes:
        with reading(f"{src}/{name}", *ZIP_ERRORS):
            return archive.read(name)

    names = [name for name in archive.namelist() if not name.endswith("/")]
    return _Files(names, read, archive.close)


def _names_and_labels(files: _Files, src: Path) -> tuple[list[str], list[int] | None]:
    """Of the arrays, by name; no labels where there are no classes."""
    check_entries(src, files.names)
    names = sorted(name for name in files.names if name.lower().endswith(".npy"))
    if DATASET_JSON not in files.names:
        raise DataError(f"{src} has no {DATASET_JSON}, allowed a folder or zip file with it")
    if not names:
        raise DataError(f"{src} has no .npy files, allowed one an image")
    return names, labels_of_json(src, names, files.read(DATASET_JSON))


def _batches(files: _Files, names: list[str], labels: list[int] | None, src: Path) -> Batches:
    def read(name: str) -> NDArray[Any]:
        return as_floats(read_npy(files.read(name), f"{src}/{name}"), f"{src}/{name}")

    classes = np.zeros(len(names), np.int64) if labels is None else np.array(labels, np.int64)
    example: tuple[int, ...] | None = None
    done = 0
    with contextlib.closing(files):
        for part, rows in in_batches(read, names):
            example = example or rows[0].shape
            if len(example) != 3:
                raise DataError(f"{src}/{part[0]}: given an array {example}, allowed (8, H, W)")
            yield stacked(rows, [f"{src}/{name}" for name in part], example), classes[done : done + len(part)]
            done += len(part)
