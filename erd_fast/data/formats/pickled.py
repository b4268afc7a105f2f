"""NumPy arrays and numbers out of pickles.

A pickle is a program that may call anything. Here the few calls of which NumPy's arrays consist are answered by records
of this file, all others are refused, and NumPy sees the bytes and a dtype of plain numbers alone.
"""

import io
import pickle
import pickletools
import re
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from erd_fast.errors import DataError

_PLAIN = re.compile(r"[fiu][1248]|b1")
_OBJECTS = "O8"


def load_numbers(content: bytes, name: object) -> Any:
    """What a pickle holds: an array or a number, or a list of these where it holds an array of Python objects.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    try:
        _check_sizes(content)
        value = _Unpickler(io.BytesIO(content)).load()
        return value.content if isinstance(value, _Array) else _plain(value)
    except Exception as error:  # a damaged pickle calls anything with anything
        raise DataError(f"{name}: its pickle cannot be read: {error or type(error).__name__}") from error


def _check_sizes(content: bytes) -> None:
    """Python's unpickler makes room for what a damaged pickle promises, gigabytes perhaps, before it looks for it."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and cast("int", argument) > len(content):
            raise pickle.UnpicklingError(f"it numbers an object {argument}, and has {len(content)} bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"  # NumPy 2 has renamed it
        if asked not in _ANSWERS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, allowed arrays and numbers of NumPy")
        return _ANSWERS[asked]


class _Type:
    """numpy.dtype("f4", align, copy), whose byte order follows as its state (version, order, ...)."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def read(self, raw: bytes | bytearray) -> NDArray[Any]:
        """(n,) numbers."""
        if not _PLAIN.fullmatch(self.code) or self.order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"it has numbers of the type {self.order}{self.code}")
        return np.frombuffer(raw, np.dtype(self.order + self.code))


class _Array:
    """An array, empty at first, whose content follows as its state (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *_: Any):
        self.content: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        if kind.code == _OBJECTS and isinstance(raw, list):
            self.content = [_plain(item) for item in raw]
        else:
            self.content = kind.read(raw).reshape(shape, order="F" if fortran else "C")


def _scalar(kind: _Type, raw: bytes) -> Any:
    return kind.read(raw)[0]


def _array_of_buffer(buffer: bytes | bytearray, kind: _Type, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return kind.read(buffer).reshape(shape, order=order)


def _plain(value: Any) -> Any:
    """An array or a number. Nothing is looked into further, so a pickle cannot ask for endless work."""
    found = value.content if isinstance(value, _Array) else value
    if not isinstance(found, int | float | np.ndarray | np.number):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, allowed arrays and numbers")
    return found


_ANSWERS: dict[str, Any] = {
    "numpy.dtype": _Type,
    "numpy.ndarray": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array_of_buffer,
}
