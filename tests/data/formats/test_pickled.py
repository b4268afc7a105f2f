"""npy and pickled: any array comes back from its bytes; nothing else does."""

import collections
import contextlib
import datetime
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from erd_fast.data.formats.npy import read_npy
from erd_fast.data.formats.pickled import load_numbers
from erd_fast.errors import DataError
from support import foreign

NUMBERS = st.one_of(
    st_numpy.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    st_numpy.integer_dtypes(endianness="?"),
    st_numpy.unsigned_integer_dtypes(endianness="?"),
)
ARRAYS = st_numpy.arrays(NUMBERS, st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
ORDERED = st.tuples(ARRAYS, st.sampled_from("CF")).map(lambda given: np.array(given[0], order=given[1]))


def same(found, array) -> bool:
    return found.shape == array.shape and found.dtype == array.dtype and np.array_equal(found, array, equal_nan=True)


@given(ORDERED)
@example(np.asfortranarray(np.arange(6).reshape(2, 3)))
@settings(max_examples=60, deadline=None)
def test_an_array_comes_back_from_npy(array):
    assert same(read_npy(foreign.npy_bytes(array), "x"), array)


@given(ORDERED, st.sampled_from((3, 4, 5)))
@example(np.asfortranarray(np.arange(6).reshape(2, 3)), 4)
@example(np.asfortranarray(np.arange(6).reshape(2, 3)), 5)
@settings(max_examples=60, deadline=None)
def test_an_array_comes_back_from_a_pickle(array, protocol):
    assert same(load_numbers(pickle.dumps(array, protocol), "x"), array)


@given(ORDERED.filter(lambda array: array.size), st.sampled_from((3, 4, 5)), st.integers(-(2**70), 2**70))
@settings(max_examples=30, deadline=None)
def test_numbers_and_arrays_of_both_come_back_from_a_pickle(array, protocol, number):
    objects = np.empty(3, object)
    objects[:] = array, number, array.flat[0]
    found = load_numbers(pickle.dumps(objects, protocol), "x")
    assert same(found[0], array) and found[1] == number and same(found[2], array.flat[0])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_cut_or_changed_is_a_data_error_or_an_array(data):
    """Never another exception, and never a longer array than there are bytes."""
    content = bytearray(data.draw(st.sampled_from(_CONTENTS)))
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] = data.draw(st.integers(0, 255))
    read = read_npy if content[:1] == b"\x93" else load_numbers
    found: list = []
    with contextlib.suppress(DataError):
        found = read(bytes(content), "file")
    assert np.asarray(found, object).size <= len(content)


_ARRAY = np.arange(6, dtype="<f4").reshape(2, 3)
_CONTENTS = [foreign.npy_bytes(_ARRAY), *(pickle.dumps(_ARRAY, protocol) for protocol in (3, 4, 5))]


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Call(os.system, "touch ran"), "it asks for posix.system, allowed arrays and numbers of NumPy"),
        (Call(eval, "open('ran', 'w')"), "it asks for builtins.eval"),
        (Call(np.load, "x"), "it asks for numpy.load"),
        (Call(getattr, "x", "upper"), "it asks for builtins.getattr"),
        (collections.OrderedDict(), "it asks for collections.OrderedDict"),
        (torch.zeros(2), "it asks for torch._utils._rebuild_tensor_v2"),
        (datetime.date(2026, 1, 1), "it asks for datetime.date"),
        (np.zeros(2, "M8[s]"), "it has numbers of the type <M8"),
        (np.zeros(2, "f4,i4"), "it has numbers of the type |V8"),
        (np.zeros(2, "S3"), "it has numbers of the type |S3"),
        (np.array([[1], None], object), "it holds a list, allowed arrays and numbers"),
        ([np.zeros(2)], "it holds a list, allowed arrays and numbers"),
        ("text", "it holds a str"),
        (None, "it holds a NoneType"),
    ],
)
def test_a_pickle_of_something_else_is_refused_and_not_run(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_numbers(pickle.dumps(value), "file")
    assert message in str(caught.value) and str(caught.value).startswith("file: its pickle cannot be read: ")
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_never_taken_for_addresses_of_objects():
    """A type of Python objects whose flags deny it made NumPy read memory at any address."""
    array = pickle.dumps(np.frombuffer(b"\x10" * 16, "<i8").copy(), 3)
    with pytest.raises(DataError):
        load_numbers(array.replace(b"X\x02\x00\x00\x00i8", b"X\x02\x00\x00\x00O8"), "file")


def test_a_pickle_cannot_ask_for_memory_that_it_does_not_fill():
    """An object that is given the number 2**31 made Python's unpickler allocate room for as many."""
    content = pickle.dumps(_ARRAY, 3).replace(b"q\x00", b"r\x00\x00\x00\x80", 1)
    with pytest.raises(DataError, match="it numbers an object 2147483648, and has"):
        load_numbers(content, "file")


def test_a_pickle_cannot_ask_for_endless_work():
    """Lists of lists of lists, each twice: a few bytes that stand for 2**60 items."""
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    objects = np.empty(1, object)
    objects[0] = bomb
    with pytest.raises(DataError, match="it holds a list"):
        load_numbers(pickle.dumps(objects), "file")


def npy_with(header: str, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (foreign.npy_bytes(_ARRAY) + b"x", "file is truncated or damaged: 25 bytes for float32 (2, 3)"),
        (foreign.npy_bytes(_ARRAY)[:-1], "file is truncated or damaged: 23 bytes for float32 (2, 3)"),
        (npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 999999999)}"), "0 bytes for float32"),
        (npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", (3, 0)), "given .npy of version (3, 0)"),
        (npy_with("{'descr': '<f4', 'shape': (2,)}"), "file: its head is damaged, or not of one array"),
        (npy_with("__import__('os').system('touch ran')"), "file: its head is damaged, or not of one array"),
        (npy_with("{'descr': '<f3', 'fortran_order': False, 'shape': (2,)}"), "file: its head cannot be read: "),
        (npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}")[:-9], "file: its head is damaged, or not"),
        (foreign.npy_bytes(np.zeros(2, "S3")), "file: its head is damaged, or not of one array of numbers"),
        (npy_with("x" * 20_000), "file: its head is damaged, or not of one array"),
        (foreign.npy_bytes(_ARRAY)[:9], "file: its head cannot be read: "),
        (foreign.npy_bytes(np.zeros(2, "f4,i4")), "file: its head is damaged, or not of one array of numbers"),
        (foreign.pickled_npy(1, 2), "file: given Python objects, which are pickled, allowed an array of numbers"),
        (b"PK\x03\x04", "file is no .npy file: it begins with 50 4b"),
        (b"", "file is no .npy file: it begins with nothing"),
    ],
)
def test_npy_files_of_another_form_are_refused(content, message):
    with pytest.raises(DataError) as caught:
        read_npy(content, "file")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_npy_of_version_2_is_read():
    header = "{'descr': '<i2', 'fortran_order': False, 'shape': (2,)}"
    assert read_npy(npy_with(header, (2, 0)) + b"\1\0\2\0", "file").tolist() == [1, 2]
