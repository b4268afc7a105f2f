"""NumPy's .npy, read from bytes or from a stream; what holds Python objects is refused.

The head is text, ``{'descr': '<f4', 'fortran_order': False, 'shape': (4, 32, 32), }``. It is read here and not by
NumPy, which has Python's parser read it: that of Python 3.11 fails now and then where several threads do so.
"""

import io
import math
import re
import struct
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.foreign import reading
from erd_fast.errors import DataError

_MAGIC = b"\x93NUMPY"
_LENGTHS = {(1, 0): "<H", (2, 0): "<I"}  # of the head's text
_LONGEST = 10_000
_TYPE = re.compile(rb"'descr':\s*'([<>=|]?[biufcO]\d*)'")
_FORTRAN = re.compile(rb"'fortran_order':\s*(True|False)")
_SHAPE = re.compile(rb"'shape':\s*\(([\d,\s]*)\)")


class Header(NamedTuple):
    """What the head of a file says of the numbers after it."""

    shape: tuple[int, ...]
    order: Literal["F", "C"]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], name: object) -> Header:
    """Read the head of a file; the stream is at the numbers afterwards. Python objects are not refused here.

    Raises:
        DataError: it is no .npy file, of a version that is not known, damaged, or of numbers with fields.
    """
    with reading(name):
        begin = stream.read(len(_MAGIC) + 2)
    if begin[:-2] != _MAGIC:
        raise DataError(f"{name} is no .npy file: it begins with {begin[:-2].hex(' ') or 'nothing'}")
    version = (begin[-2], begin[-1])
    if version not in _LENGTHS:
        raise DataError(f"{name}: given .npy of version {version}, allowed (1, 0) and (2, 0)")
    with reading(f"{name}: its head", struct.error, TypeError):
        (length,) = struct.unpack(_LENGTHS[version], stream.read(struct.calcsize(_LENGTHS[version])))
        text = stream.read(min(length, _LONGEST))
        found = [pattern.search(text) for pattern in (_TYPE, _FORTRAN, _SHAPE)]
        if len(text) < length or not all(found):
            raise DataError(f"{name}: its head is damaged, or not of one array of numbers: {text[:200]!r}")
        kind, fortran, shape = (match[1].decode() for match in found if match)
        return Header(
            tuple(int(side) for side in shape.replace(",", " ").split()),
            "F" if fortran == "True" else "C",
            np.dtype(kind),
        )


def refuse_objects(header: Header, name: object) -> None:
    """Raises DataError if the file is a pickle of Python objects."""
    if header.dtype.hasobject:
        raise DataError(f"{name}: given Python objects, which are pickled, allowed an array of numbers")


def read_npy(content: bytes, name: object) -> NDArray[Any]:
    """The array of a whole file, on its bytes and thus read-only.

    Raises:
        DataError: it is no .npy file, holds Python objects, or not as many bytes as its head promises.
    """
    stream = io.BytesIO(content)
    header = read_header(stream, name)
    refuse_objects(header, name)
    begin = stream.tell()
    if len(content) - begin != header.size:
        raise DataError(
            f"{name} is truncated or damaged: {len(content) - begin} bytes for {header.dtype} {header.shape}"
        )
    return np.frombuffer(content, header.dtype, offset=begin).reshape(header.shape, order=header.order)
