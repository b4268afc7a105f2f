"""Folders of IDX files, the format of MNIST and Fashion-MNIST, into stores.

A file is big-endian: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension in 32 bits,
then the numbers in order (yann.lecun.com/exdb/mnist). The training pair of a folder is imported::

    train-images-idx3-ubyte[.gz]    (n, H, W) grey levels
    train-labels-idx1-ubyte[.gz]    (n,) classes
"""

import contextlib
import gzip
import hashlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from erd_fast.data.store import LatentStore
from erd_fast.data.writer import write_store
from erd_fast.errors import DataError
from erd_fast.progress import Progress

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_PIECE = 1 << 24  # bytes read, and about as many imported, at a time
_UNSIGNED_BYTE = 8


def find_idx(folder: Path) -> tuple[Path, Path] | None:
    """(images, labels) of a folder, plain or gzipped; None where neither is there.

    Raises:
        DataError: one of them is there without the other.
    """
    images, labels = (_plain_or_gzipped(folder / name) for name in IDX_NAMES)
    if images and labels:
        return images, labels
    for there, missing in ((images, IDX_NAMES[1]), (labels, IDX_NAMES[0])):
        if there:
            raise DataError(f"{folder} has {there.name} and no {missing} or {missing}.gz")
    return None


def _plain_or_gzipped(file: Path) -> Path | None:
    zipped = file.with_name(f"{file.name}.gz")
    return file if file.is_file() else zipped if zipped.is_file() else None


def idx_identity(files: tuple[Path, Path]) -> str:
    """A name for the content of the files: the beginning of a hash of them."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return f"idx-{total.hexdigest()[:16]}"


def import_idx(files: tuple[Path, Path], path: Path) -> LatentStore:
    """Write the images and labels as a store of pixels (1, H, W) uint8, with a progress bar on a terminal.

    Labels are classes 0 to the largest one.

    Raises:
        DataError: a file is truncated, damaged, of another type or shape, or the two have different counts.
    """
    images, labels = files
    classes = _read_labels(labels)
    num_classes = int(classes.max()) + 1
    return write_store(path, _batches(images, classes, labels), kind="pixels", num_classes=num_classes)


def _read_labels(file: Path) -> Tensor:
    with _opened(file) as stream:
        (count,) = _dimensions(stream, file, 1)
        if not count:
            raise DataError(f"{file}: given 0 labels, allowed 1 or more")
        labels = _exactly(stream, file, count, count)
        _at_end(stream, file, count)
        return torch.from_numpy(labels).long()


def _batches(file: Path, classes: Tensor, labels: Path) -> Iterator[tuple[Tensor, Tensor]]:
    with _opened(file) as stream:
        count, height, width = _dimensions(stream, file, 3)
        if count != len(classes):
            raise DataError(f"{file} has {count} images and {labels.name} {len(classes)} labels; allowed equally many")
        if height * width == 0:
            raise DataError(f"{file}: given images of {height} x {width} pixels, allowed at least 1 x 1")
        print(f"importing {count} images of {file.parent}", flush=True)
        with Progress("importing", "image", count) as progress:
            batch = max(1, _PIECE // (height * width))
            for first in range(0, count, batch):
                size = min(batch, count - first)
                pixels = _exactly(stream, file, size * height * width, count * height * width)
                rows = torch.from_numpy(pixels).view(size, 1, height, width)
                yield rows, classes[first : first + size]
                progress.count(size)
        _at_end(stream, file, count * height * width)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A file, plain or gzipped, whose damage is a DataError."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield cast("IO[bytes]", stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is truncated or damaged: {error}") from error


def _dimensions(stream: IO[bytes], file: Path, wanted: int) -> tuple[int, ...]:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE or head[3] != wanted:
        raise DataError(
            f"{file}: given a file that begins with {head.hex(' ') or 'nothing'}, allowed 00 00 08 {wanted:02x}: "
            f"IDX of unsigned bytes in {wanted} dimension{'s' * (wanted > 1)}"
        )
    sizes = stream.read(4 * wanted)
    if len(sizes) < 4 * wanted:
        raise DataError(f"{file} is truncated: it ends in its header")
    return struct.unpack(f">{wanted}I", sizes)


def _exactly(stream: IO[bytes], file: Path, size: int, whole: int) -> np.ndarray:
    content = bytearray()
    while len(content) < size:  # in pieces, as the header of a damaged file may promise any size
        piece = stream.read(min(size - len(content), _PIECE))
        if not piece:
            raise DataError(f"{file} is truncated: its header promises {whole} numbers, and it ends before them")
        content += piece
    return np.frombuffer(content, np.uint8)


def _at_end(stream: IO[bytes], file: Path, whole: int) -> None:
    if stream.read(1):
        raise DataError(f"{file} is damaged: its header promises {whole} numbers, and it holds more")
