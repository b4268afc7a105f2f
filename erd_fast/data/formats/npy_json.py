"""Folders or zip files of one .npy file an image, with their labels in dataset.json: EDM2's and REPA's.

::

    dataset.json                             {"labels": [["00000/img-mean-std-00000000.npy", 7], ...]}, or null
    00000/img-mean-std-00000000.npy          (8, H, W) float32, mean and std of the posterior

The two look alike and are not: EDM2 fed the autoencoder pixels of 0 to 1, for which it was not made, and REPA those of
-1 to 1.
"""

import contextlib
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.formats.npy import read_npy
from erd_fast.data.formats.source import (
    SD_SCALE,
    Batches,
    ImportOptions,
    Source,
    as_floats,
    class_number,
    in_batches,
    reading,
    stacked,
)
from erd_fast.errors import DataError

_SD_MSE = "stabilityai/sd-vae-ft-mse"
_EDM2_MEANS = (5.81, 3.25, 0.12, -2.15)
_EDM2_STDS = (4.17, 4.62, 3.71, 3.28)
_LABELS = "dataset.json"
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


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
    with reading(f"{src} as a folder or zip file", *_ZIP_ERRORS):
        archive = zipfile.ZipFile(src)

    def read(name: str) -> bytes:
        with reading(f"{src}/{name}", *_ZIP_ERRORS):
            return archive.read(name)

    names = [name for name in archive.namelist() if not name.endswith("/")]
    return _Files(names, read, archive.close)


def _names_and_labels(files: _Files, src: Path) -> tuple[list[str], list[int] | None]:
    """Of the arrays, by name; no labels where there are no classes."""
    for name in files.names:
        _stay_inside(name, f"{src} has an entry")
    names = sorted(name for name in files.names if name.lower().endswith(".npy"))
    if _LABELS not in files.names:
        raise DataError(f"{src} has no {_LABELS}, allowed a folder or zip file with it")
    if not names:
        raise DataError(f"{src} has no .npy files, allowed one an image")
    for name, following in itertools.pairwise(names):
        if name == following:
            raise DataError(f"{src} has two entries {name}")
    return names, _labels(files, names, f"{src}/{_LABELS}")


def _stay_inside(name: str, who: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{who} {name!r}, which leaves the folder, allowed names within it")


def _labels(files: _Files, names: list[str], file: str) -> list[int] | None:
    """The label of each of ``names``; None where there are no classes."""
    try:
        content = json.loads(files.read(_LABELS))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise DataError(f'{file} has no field "labels"')
    if content["labels"] is None:
        return None
    table = _label_table(content["labels"], file)
    for name in names:
        if name not in table:
            raise DataError(f"{file} has no label for {name}")
    if len(table) > len(names):
        missing = sorted(table.keys() - set(names))
        raise DataError(f"{file} names {missing[0]}, which is missing (files like it: {len(missing):,})")
    return [table[name] for name in names]


def _label_table(entries: Any, file: str) -> dict[str, int]:
    if not isinstance(entries, list):
        raise DataError(f'{file}: "labels": given a {type(entries).__name__}, allowed [[file, label], ...] or null')
    table: dict[str, int] = {}
    for entry in entries:
        if type(entry) is not list or len(entry) != 2 or type(entry[0]) is not str or type(entry[1]) is not int:
            raise DataError(f'{file}: "labels": given {str(entry)[:80]}, allowed [file, whole number]')
        _stay_inside(entry[0], f"{file} names")
        if entry[0] in table:
            raise DataError(f"{file} names {entry[0]} twice")
        table[entry[0]] = class_number(entry[1], file)
    return table


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
