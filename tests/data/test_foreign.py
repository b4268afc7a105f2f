"""foreign: dataset.json and the names in archives, as others write them."""

import json

import pytest

from erd_fast.data.foreign import check_entries, labels_of_json
from erd_fast.errors import DataError

NAMES = ["a/1.png", "b.png"]


def _json(*pairs: object) -> bytes:
    return json.dumps({"labels": pairs, "more": 1}).encode()


def test_labels_come_in_the_order_of_the_names():
    assert labels_of_json("src", NAMES, _json(["b.png", 0], ["a/1.png", 2**31 - 1])) == [2**31 - 1, 0]
    assert labels_of_json("src", NAMES, b'{"labels": null}') is None


FORM = 'allowed {"labels": [[name, class], ...]} or null'
RIGHT = (["a/1.png", 0], ["b.png", 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON: "),
        (b"\xff", "cannot be read as JSON: "),
        (b"[" * 100_000, "cannot be read as JSON: "),
        (b"[]", f": given [], {FORM}"),
        (b"{}", f": given {{}}, {FORM}"),
        (b'{"labels": {}}', f": given {{'labels': {{}}}}, {FORM}"),
        (_json(["b.png", 1.0]), f": given ['b.png', 1.0], {FORM}"),
        (_json(["b.png", True]), f": given ['b.png', True], {FORM}"),
        (_json(["b.png", [0, 1]]), f": given ['b.png', [0, 1]], {FORM}"),
        (_json(["b.png"]), f": given ['b.png'], {FORM}"),
        (_json("b.png"), f": given b.png, {FORM}"),
        (_json([3, 3]), f": given [3, 3], {FORM}"),
        (_json(["b.png", -1]), ": given label -1, allowed 0 to 2147483647"),
        (_json(["b.png", 2**31]), ": given label 2147483648, allowed 0 to 2147483647"),
        (_json(*RIGHT, ["b.png", 1]), " has 2 entries b.png, allowed one"),
        (_json(*RIGHT, ["../b.png", 1]), ": entry '../b.png' leaves the folder, allowed paths within it"),
        (_json(RIGHT[0]), " has no label for b.png (files like it: 1)"),
        (_json(), " has no label for a/1.png (files like it: 2)"),
        (_json(*RIGHT, ["x.png", 1]), " names x.png, which is missing (files like it: 1)"),
    ],
)
def test_other_forms_are_named(content, message):
    with pytest.raises(DataError) as caught:
        labels_of_json("src", NAMES, content)
    assert str(caught.value).startswith("src/dataset.json") and message in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..", "C:x", "a\\..\\x", "\\x"])
def test_entries_that_leave_the_folder_are_refused(name):
    with pytest.raises(DataError) as caught:
        check_entries("src.zip", ["a", name])
    assert str(caught.value) == f"src.zip: entry {name!r} leaves the folder, allowed paths within it"


def test_entries_within_the_folder_may_have_any_other_name():
    check_entries("src.zip", ["a", "a/b", "..a", "a..", "a/..b", "xy:z", ""])
    with pytest.raises(DataError, match=r"^src.zip has 3 entries a, allowed one$"):
        check_entries("src.zip", ["b", "a", "a", "c", "a", "c"])
