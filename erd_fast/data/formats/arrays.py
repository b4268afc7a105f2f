"""NumPy arrays of a whole data set: latents or pixels (N, C, H, W), and labels (N,) if there are any.

::

    latents.npy                  or any other name; labels by --labels
    latents.npz                  with latents, and labels if there are any
    folder/                      with latents.npy, and labels.npy if there are any
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.foreign import ZIP_ERRORS, reading
from erd_fast.data.formats.npy import Header, read_header, read_npy, refuse_objects
from erd_fast.data.formats.source import ROWS_AT_ONCE, Batches, ImportOptions, Source, as_floats, as_labels
from erd_fast.errors import ConfigError, DataError
from erd_fast.latents import FLOAT_KINDS

_PIXEL_CHANNELS = (1, 3)


class _Rows(NamedTuple):
    """An array that is read a part at a time, once."""

    header: Header
    parts: Iterator[NDArray[Any]]


def open_numpy(src: Path, options: ImportOptions) -> Source:
    """uint8 is pixels, floats are what ``options.kind`` says; all else is for the options to say.

    A .npy file is mapped, one within .npz is read as a stream.
    """
    rows, labels = _rows_and_labels(src, options.labels)
    shape = rows.header.shape
    if len(shape) != 4:
        raise DataError(f"{src}: given an array {shape}, allowed (N, C, H, W)")
    if not rows.header.size:
        raise DataError(f"{src}: given an array {shape} without numbers, allowed (N, C, H, W)")
    classes = np.zeros(shape[0], np.int64) if labels is None else labels
    if classes.shape != shape[:1]:
        raise DataError(f"{src}: given labels {classes.shape} for {shape[0]} samples, allowed ({shape[0]},)")
    return Source(
        batches=_batches(rows, classes),
        kind=_kind(src, rows.header, options),
        count=shape[0],
        num_classes=0 if labels is None else None,
        flip=options.flip or "none",
    )


def _rows_and_labels(src: Path, labels: Path | None) -> tuple[_Rows, NDArray[Any] | None]:
    given = None if labels is None else _label_array(labels.read_bytes, labels)
    if src.is_dir():
        beside = src / "labels.npy"
        if given is None and beside.is_file():
            given = _label_array(beside.read_bytes, beside)
        return _mapped(src / "latents.npy"), given
    if src.suffix != ".npz":
        return _mapped(src), given
    with _archive(src) as archive:
        if given is None and "labels.npy" in archive.namelist():
            given = _label_array(lambda: archive.read("labels.npy"), f"{src}: labels")
        return _streamed(archive, src), given


@contextlib.contextmanager
def _archive(src: Path) -> Iterator[zipfile.ZipFile]:
    with reading(f"{src} as .npz", *ZIP_ERRORS), zipfile.ZipFile(src) as archive:
        yield archive


def _label_array(read: Callable[[], bytes], name: object) -> NDArray[Any]:
    with reading(name, *ZIP_ERRORS):
        content = read()
    return as_labels(read_npy(content, name), name)


def _mapped(file: Path) -> _Rows:
    with reading(file), open(file, "rb") as stream:
        header = read_header(stream, file)
        begin, size = stream.tell(), file.stat().st_size
    refuse_objects(header, file)
    if size - begin != header.size:
        raise DataError(f"{file} is truncated or damaged: {size - begin} bytes for {header.dtype} {header.shape}")

    def parts() -> Iterator[NDArray[Any]]:
        with reading(file):
            array = np.memmap(file, header.dtype, "r", begin, header.shape, header.order)
        for first in range(0, len(array), ROWS_AT_ONCE):
            yield array[first : first + ROWS_AT_ONCE]

    return _Rows(header, parts())


def _streamed(archive: zipfile.ZipFile, src: Path) -> _Rows:
    name = f"{src}: latents"
    if "latents.npy" not in archive.namelist():
        there = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist())
        raise DataError(f"{src} has no array latents; it has {there or 'nothing'}")
    with archive.open("latents.npy") as stream:
        header = read_header(stream, name)
    refuse_objects(header, name)
    if header.order == "F":
        raise DataError(f"{name}: given an array in Fortran order, allowed C order: it is read from front to back")

    def parts() -> Iterator[NDArray[Any]]:
        row = math.prod(header.shape[1:]) * header.dtype.itemsize
        with _archive(src) as archive, archive.open("latents.npy") as stream:
            read_header(stream, name)
            for first in range(0, header.shape[0], ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, header.shape[0] - first)
                with reading(name, *ZIP_ERRORS):
                    content = stream.read(count * row)
                if len(content) < count * row:
                    raise DataError(f"{name} is truncated: it ends within sample {first + len(content) // row}")
                yield np.frombuffer(content, header.dtype).reshape(count, *header.shape[1:])

    return _Rows(header, parts())


def _kind(src: Path, header: Header, options: ImportOptions) -> Any:
    if header.dtype == np.uint8:
        if options.kind is not None:
            raise ConfigError(f"kind: given {options.kind} for {src}, which holds bytes, and those are pixels")
        if header.shape[1] not in _PIXEL_CHANNELS:
            raise DataError(f"{src}: given pixels {header.shape}, allowed (N, C, H, W) with C 1 or 3")
        return "pixels"
    as_floats(np.empty(0, header.dtype), src)
    if options.kind is None:
        raise ConfigError(
            f"kind: given none for the floats of {src}, allowed {', '.join(FLOAT_KINDS)}: numbers do not say it"
        )
    return options.kind


def _batches(rows: _Rows, classes: NDArray[Any]) -> Batches:
    done = 0
    for part in rows.parts:
        yield part, classes[done : done + len(part)]
        done += len(part)
