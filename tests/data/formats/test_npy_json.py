"""edm2 and repa: folder or zip file, labels, and what is refused."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from erd_fast.data.check import judge
from erd_fast.data.formats.registry import open_source
from erd_fast.data.formats.source import ImportOptions
from erd_fast.data.statistics import measure_some
from erd_fast.errors import DataError
from support import foreign

FIRST, SECOND = (f"00000/img-mean-std-0000000{number}.npy" for number in (0, 1))


@pytest.fixture
def folder(tmp_path):
    foreign.edm2(tmp_path / "edm2", 12, 4)
    return tmp_path / "edm2"


@pytest.fixture(params=["folder", "zip"])
def source(request, folder):
    """``source(change)``: the data set as a folder, or as the zip file of it, after ``change`` of the folder."""

    def make(change=lambda folder: None):
        change(folder)
        return folder if request.param == "folder" else zipped(folder)

    return make


def zipped(folder):
    return shutil.make_archive(str(folder), "zip", folder) and folder.with_suffix(".zip")


def edit(**fields):
    """Change dataset.json; None removes a field."""

    def change(folder):
        file = folder / "dataset.json"
        content = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def edit_labels(act):
    def change(folder):
        labels = json.loads((folder / "dataset.json").read_text())["labels"]
        act(labels)
        edit(labels=labels)(folder)

    return change


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def test_a_folder_and_its_zip_file_are_the_same(folder, imported):
    assert imported("edm2", folder).fingerprint == imported("edm2", zipped(folder)).fingerprint


def test_labels_belong_to_names_and_rows_come_by_name(source, imported):
    def change(labels):
        for number, entry in enumerate(labels):
            entry[1] = 11 - number
        labels.reverse()

    store = imported("edm2", source(edit_labels(change)))
    assert store.labels.tolist() == list(range(11, -1, -1)) and store.manifest.num_classes == 12


def test_labels_of_null_are_no_classes(source, imported):
    src = source(lambda folder: (folder / "dataset.json").write_text('{"labels": null}'))
    store = imported("edm2", src)
    assert store.manifest.num_classes == 0 and not store.labels.any() and len(store) == 12


def test_repa_is_found_in_the_folder_around_it_and_as_a_zip_file(tmp_path, imported):
    foreign.repa(tmp_path / "repa", 12, 4)
    (tmp_path / "repa" / "images").mkdir()
    (tmp_path / "repa" / "images" / "x.npy").write_bytes(b"")
    found = [imported("repa", src) for src in (tmp_path / "repa", tmp_path / "repa" / "vae-sd")]
    found.append(imported("repa", zipped(tmp_path / "repa" / "vae-sd")))
    assert len({store.fingerprint for store in found}) == 1


def test_edm2_and_repa_read_for_each_other_are_noticed_by_the_check(tmp_path, imported):
    foreign.edm2(tmp_path / "edm2")
    foreign.repa(tmp_path / "repa")
    for name, other, src in (("repa", "edm2", "edm2"), ("edm2", "repa", "repa/vae-sd")):
        right, wrong = imported(other, tmp_path / src), imported(name, tmp_path / src)
        assert right.manifest.pixel_range != wrong.manifest.pixel_range
        assert judge(right, measure_some(right)) == []
        assert any("fed pixels of another range" in finding.text for finding in judge(wrong, measure_some(wrong)))


ROW = foreign.moments(1, 4, foreign.SD_SCALE)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "has no dataset.json, allowed a folder or zip file"),
        (edit_labels(lambda labels: labels.pop(1)), f"/dataset.json has no label for {SECOND}"),
        (lambda folder: (folder / SECOND).unlink(), f"dataset.json names {SECOND}, which is missing"),
        (lambda folder: shutil.rmtree(folder / "00000"), "has no .npy files, allowed one an image"),
        (put(SECOND, foreign.npy_bytes(ROW)[:-1]), f"/{SECOND} is truncated or damaged: 511 bytes for float32"),
        (put(SECOND, foreign.npy_bytes(ROW[:4])), f"/{SECOND}: given 4 x 4 x 4 numbers, allowed 8 x 4 x 4"),
        (put(FIRST, foreign.npy_bytes(ROW[None])), f"/{FIRST}: given an array (1, 8, 4, 4), allowed (8, H, W)"),
        (put(FIRST, foreign.npy_bytes(ROW.astype("u1"))), f"/{FIRST}: given latents uint8, allowed floats"),
        (put(FIRST, foreign.pickled_npy(ROW, 1)), f"/{FIRST}: given Python objects, which are pickled"),
    ],
)
def test_data_sets_of_another_form_are_refused(change, message, source, refused):
    src = source(change)
    found = refused("edm2", src)
    assert found.startswith(str(src)) and message in found


@pytest.mark.parametrize("name", ["../x.npy", "/x.npy"])
def test_zip_entries_that_leave_the_folder_are_refused(name, folder, tmp_path, refused):
    src = zipped(folder)
    with zipfile.ZipFile(src, "a") as archive:
        archive.writestr(name, foreign.npy_bytes(ROW))
    assert refused("edm2", src) == f"{src}: entry {name!r} leaves the folder, allowed paths within it"
    assert sorted(os.listdir(tmp_path)) == ["edm2", "edm2.zip"]


def test_a_damaged_zip_file_is_named(folder, refused):
    src = zipped(folder)
    content = src.read_bytes()
    src.write_bytes(content[: len(content) // 2])
    assert refused("edm2", src) == f"{src} as a folder or zip file cannot be read: File is not a zip file"
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:  # stored: a byte of a number can be changed
        for file in (file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(folder))
    content = bytearray(src.read_bytes())
    place = content.index(np.load(folder / SECOND).tobytes())
    content[place] ^= 1
    src.write_bytes(content)
    assert refused("edm2", src).startswith(f"{src}/{SECOND} cannot be read: Bad CRC-32")


def test_a_single_array_is_neither_folder_nor_zip_file(folder, refused):
    assert "as a folder or zip file cannot be read" in refused("repa", folder / FIRST)


def test_a_zip_file_with_two_entries_of_one_name_is_refused(folder, refused):
    src = zipped(folder)
    with zipfile.ZipFile(src, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(FIRST, foreign.npy_bytes(ROW))
    assert refused("edm2", src) == f"{src} has 2 entries {FIRST}, allowed one"


def test_a_zip_file_is_closed_when_it_was_read_and_when_it_is_refused(folder):
    src = zipped(folder)

    def is_open():
        return any(os.path.realpath(handle) == str(src.resolve()) for handle in Path("/proc/self/fd").iterdir())

    source = open_source("edm2", src, ImportOptions())
    next(source.batches)
    assert is_open()
    source.batches.close()
    assert not is_open()
    (folder / SECOND).unlink()
    with pytest.raises(DataError) as _held:  # which holds the frames that hold the file
        open_source("edm2", zipped(folder), ImportOptions())
    assert not is_open()
