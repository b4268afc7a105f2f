"""MaskDiT's LMDB and WebDataset (arXiv 2306.09305).

::

    lmdb          z-0, z-1, ...    (8, R, R) float32, mean and log-variance of the posterior, raw bytes
                  y-0, y-1, ...    label in decimal digits
                  length           samples in decimal digits, written last
    webdataset    *.tar: 0000000.latent    such an array, pickled;  0000000.cls    label in decimal digits

Mirrored copies, where they were asked for, come after all originals, in the same order.
"""

import contextlib
import itertools
import math
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.foreign import class_number, reading
from erd_fast.data.formats.pickled import load_numbers
from erd_fast.data.formats.source import (
    ROWS_AT_ONCE,
    SD_SCALE,
    Batches,
    ImportOptions,
    Source,
    as_floats,
    need_pickles,
    stacked,
    warn_of_gaps,
)
from erd_fast.data.manifest import ADM_CROP
from erd_fast.errors import DataError
from erd_fast.extras import load

_CHANNELS = 8
_DIGITS = 19
_TAR_END = 1024
_NUMBER = re.compile(r"(\d+)\.tar$")


def open_maskdit_lmdb(src: Path, options: ImportOptions) -> Source:
    """Mean and log-variance, scaled by 0.18215; ``src`` may be the folder around train/ and val/.

    The second half is taken for mirrored copies if its labels are those of the first half again.
    """
    lmdb = load("lmdb", "formats", "maskdit-lmdb")
    folder = src if (src / "data.mdb").is_file() else src / options.split
    if not (folder / "data.mdb").is_file():
        raise DataError(f"{src} has neither data.mdb nor {options.split}/data.mdb")
    with _lmdb_values(lmdb, folder) as values:
        count = _integer(values(b"length"), f"{folder}: length, which is written last,")
        labels = np.array([_label(values(b"y-%d" % i), f"{folder}: y-{i}") for i in range(count)], np.int64)
    first, second = labels[: count // 2], labels[(count + 1) // 2 :]
    mirrored = count % 2 == 0 and len(np.unique(labels)) > 1 and np.array_equal(first, second)
    return Source(
        batches=_lmdb_batches(lmdb, folder, labels),
        kind="mean_logvar",
        count=count,
        scale=(SD_SCALE,),
        crop=ADM_CROP,
        flip="stored" if mirrored else "none",
    )


def open_maskdit_webdataset(src: Path, options: ImportOptions) -> Source:
    """Mean and log-variance, scaled by 0.18215, of all .tar files of a folder by name, or of one .tar file."""
    need_pickles(options, "the latents of maskdit-webdataset are pickles")
    tariterators = load("webdataset.tariterators", "formats", "maskdit-webdataset")
    files = sorted(src.glob("*.tar")) if src.is_dir() else [src]
    if not files:
        raise DataError(f"{src} has no .tar files")
    warn_of_gaps((int(end[1]) for file in files if src.is_dir() and (end := _NUMBER.search(file.name))), f"{src}/*.tar")
    return Source(
        batches=_tar_batches(tariterators, files),
        kind="mean_logvar",
        count=None,
        scale=(SD_SCALE,),
        crop=ADM_CROP,
        flip=options.flip or "none",
    )


@contextlib.contextmanager
def _lmdb_values(lmdb: ModuleType, folder: Path) -> Iterator[Any]:
    """A function from keys to values, which are bytes of the file, or None."""
    with (
        reading(f"{folder} as LMDB", lmdb.Error),
        contextlib.closing(lmdb.open(str(folder), readonly=True, lock=False, create=False)) as environment,
    ):
        pages = environment.info()["last_pgno"] + 1
        wanted, found = pages * environment.stat()["psize"], (folder / "data.mdb").stat().st_size
        if found < wanted:  # the file is mapped: to read beyond its end would end the process
            raise DataError(f"{folder}/data.mdb is truncated: {found} bytes, its head promises {wanted}")
        with environment.begin(buffers=True) as transaction:
            yield transaction.get


def _integer(value: Any, name: str) -> int:
    if value is None:
        raise DataError(f"{name} is missing")
    digits = bytes(value)
    if not digits.isdigit() or len(digits) > _DIGITS:
        raise DataError(f"{name} is {digits[:20]!r}, allowed decimal digits")
    return int(digits)


def _label(value: Any, name: str) -> int:
    return class_number(_integer(value, name), name)


def _lmdb_batches(lmdb: ModuleType, folder: Path, labels: NDArray[Any]) -> Batches:
    with _lmdb_values(lmdb, folder) as values:
        example: tuple[int, ...] | None = None
        for first in range(0, len(labels), ROWS_AT_ONCE):
            numbers = range(first, min(first + ROWS_AT_ONCE, len(labels)))
            names = [f"{folder}: z-{number}" for number in numbers]
            rows = [_raw(values(b"z-%d" % number), name) for number, name in zip(numbers, names, strict=True)]
            example = example or rows[0].shape
            yield stacked(rows, names, example), labels[first : first + ROWS_AT_ONCE]


def _raw(value: Any, name: str) -> NDArray[Any]:
    """(8, R, R) float32."""
    if value is None:
        raise DataError(f"{name} is missing")
    side = math.isqrt(len(value) // (4 * _CHANNELS))
    if not side or len(value) != 4 * _CHANNELS * side * side:
        raise DataError(f"{name}: given {len(value)} bytes, allowed {_CHANNELS} x R x R numbers of 4 bytes")
    return np.frombuffer(value, "<f4").reshape(_CHANNELS, side, side)


def _tar_batches(tariterators: ModuleType, files: list[Path]) -> Batches:
    example: tuple[int, ...] | None = None
    for file in files:
        samples = _tar_samples(tariterators, file)
        while part := list(itertools.islice(samples, ROWS_AT_ONCE)):
            names, rows, labels = zip(*part, strict=True)
            example = example or rows[0].shape
            yield stacked(rows, names, example), np.array(labels)


def _tar_samples(tariterators: ModuleType, file: Path) -> Iterator[tuple[str, NDArray[Any], int]]:
    """Names, latents (8, R, R) and labels."""
    for sample in _tar_groups(tariterators, file):
        name = f"{file}: {sample['__key__']}"
        for key in ("latent", "cls"):
            if key not in sample:
                there = ", ".join(sorted(key for key in sample if not key.startswith("__")))
                raise DataError(f"{name} has no .{key}; it has {there}")
        latents = load_numbers(sample["latent"], f"{name}.latent")
        if not isinstance(latents, np.ndarray) or latents.ndim != 3:
            raise DataError(f"{name}.latent: given a pickle of something else, allowed an array (8, R, R)")
        yield name, as_floats(latents, name), _label(sample["cls"], f"{name}.cls")


def _tar_groups(tariterators: ModuleType, file: Path) -> Iterator[dict[str, Any]]:
    """The files of a sample under their suffixes."""
    try:
        with open(file, "rb") as stream:
            _check_end(stream, file)
            yield from tariterators.group_by_keys(
                tariterators.tar_file_expander([{"url": str(file), "stream": stream}])
            )
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        reason = error if isinstance(error, OSError) else error.args[0]  # to which webdataset has added arguments
        raise DataError(f"{file} as a tar file cannot be read: {reason}") from error


def _check_end(stream: IO[bytes], file: Path) -> None:
    """A tar file that was cut between two entries reads like a shorter one, but for the zeros that end it."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAR_END))
    if stream.read().strip(b"\0"):
        raise DataError(f"{file} is truncated, or no tar file: it does not end in {_TAR_END} zero bytes")
    stream.seek(0)
