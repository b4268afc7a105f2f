"""IDX folders: what is read, and what is refused."""

import gzip
import os
import shutil

import numpy as np
import pytest
import torch

from erd_fast.data import LatentStore, open_dataset
from erd_fast.data.idx import IDX_NAMES, find_idx, import_idx
from erd_fast.errors import DataError
from support.fixtures import idx_bytes, write_fixtures

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 7, 5), np.uint8)
LABELS = np.arange(50) % 4


def write_pair(folder, images=None, labels=None, zipped=False):
    """A folder of both files, from arrays or from bytes."""
    folder.mkdir(exist_ok=True)
    for name, given, default in zip(IDX_NAMES, (images, labels), (IMAGES, LABELS), strict=True):
        content = given if isinstance(given, bytes) else idx_bytes(default if given is None else given)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def huge(*sizes):
    """A header that promises more than any memory holds, and a few bytes."""
    return bytes((0, 0, 8, len(sizes))) + np.array(sizes, ">u4").tobytes() + b"few"


def imported(folder, path):
    files = find_idx(folder)
    assert files is not None
    return import_idx(files, path)


@pytest.mark.parametrize("zipped", [False, True])
def test_images_and_labels_arrive_as_they_are(tmp_path, zipped):
    store = imported(write_pair(tmp_path / "idx", zipped=zipped), tmp_path / "store")
    assert (store.manifest.kind, store.manifest.shape, store.manifest.num_classes) == ("pixels", (1, 7, 5), 4)
    assert torch.equal(store.gather(torch.arange(50))[:, 0], torch.from_numpy(IMAGES))
    assert store.labels.tolist() == LABELS.tolist()


def test_more_images_than_one_batch_keep_their_order(tmp_path):
    images = (
        np.repeat(np.arange(5000, dtype=np.uint16), 2048).view(np.uint8).reshape(5000, 64, 64)
    )  # each image is its own number
    store = imported(write_pair(tmp_path / "idx", images, np.arange(5000) % 10), tmp_path / "store")
    rows = torch.tensor([0, 4095, 4096, 4999])  # a piece is 4096 images of 64 x 64
    assert torch.equal(store.gather(rows)[:, 0], torch.from_numpy(images)[rows])
    assert store.labels[rows].tolist() == [0, 5, 6, 9]


def test_the_fixture_is_one_and_trains_square_images(tmp_path):
    folder = next(path for path in write_fixtures(tmp_path) if path.name == "idx")
    store = imported(folder, tmp_path / "store")
    assert (len(store), store.manifest.shape, store.manifest.num_classes) == (1797, (1, 28, 28), 10)


def test_a_folder_is_imported_once_for_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path / "cache"))
    folder = write_pair(tmp_path / "idx")
    first = open_dataset(str(folder))
    monkeypatch.setattr("erd_fast.data.importers.import_idx", lambda *_: pytest.fail("imported again"))
    shutil.copytree(folder, tmp_path / "copy")
    assert open_dataset(str(folder)).path == open_dataset(str(tmp_path / "copy")).path == first.path
    monkeypatch.undo()
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path / "cache"))
    write_pair(folder, labels=LABELS[::-1])
    second = open_dataset(str(folder))
    assert second.path != first.path and second.labels.tolist() == LABELS[::-1].tolist()


def test_a_store_in_the_same_folder_comes_first(tmp_path):
    store = imported(write_pair(tmp_path / "idx"), tmp_path / "store")
    write_pair(store.path, labels=LABELS[::-1])
    assert open_dataset(str(store.path)).path == store.path


def test_plain_files_come_before_gzipped_ones(tmp_path):
    folder = write_pair(write_pair(tmp_path / "idx", labels=LABELS[::-1], zipped=True))
    assert imported(folder, tmp_path / "store").labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx_bytes(IMAGES)[:-1], None, "train-images-idx3-ubyte is truncated: its header promises 1750 numbers"),
        (idx_bytes(IMAGES)[:9], None, "train-images-idx3-ubyte is truncated: it ends in its header"),
        (idx_bytes(IMAGES) + b"x", None, "train-images-idx3-ubyte is damaged: .* it holds more"),
        (huge(50, 0xFFFFFFFF, 0xFFFFFFFF), None, "train-images-idx3-ubyte is truncated: its header promises"),
        (huge(50, 0x7FFFFFFF, 100), None, "train-images-idx3-ubyte is truncated: its header promises"),
        (None, huge(0xFFFFFFFF), "train-labels-idx1-ubyte is truncated: its header promises 4294967295"),
        (b"", None, "train-images-idx3-ubyte: given a file that begins with nothing, allowed 00 00 08 03"),
        (idx_bytes(LABELS), None, "train-images-idx3-ubyte: given a file that begins with 00 00 08 01, allowed"),
        (b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:], None, "begins with 00 00 0d 03, allowed 00 00 08 03"),
        (IMAGES[:, :0], None, "train-images-idx3-ubyte: given images of 0 x 5 pixels, allowed at least 1 x 1"),
        (IMAGES[:49], None, "has 49 images and train-labels-idx1-ubyte 50 labels; allowed equally many"),
        (None, idx_bytes(LABELS)[:-1], "train-labels-idx1-ubyte is truncated: its header promises 50 numbers"),
        (None, idx_bytes(LABELS) + b"x", "train-labels-idx1-ubyte is damaged"),
        (None, idx_bytes(IMAGES), "train-labels-idx1-ubyte: given a file that begins with 00 00 08 03, allowed"),
        (None, LABELS[:0], "train-labels-idx1-ubyte: given 0 labels, allowed 1 or more"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_files_are_named_and_leave_nothing(tmp_path, images, labels, message, zipped):
    folder = write_pair(tmp_path / "idx", images, labels, zipped)
    with pytest.raises(DataError, match=message.replace("ubyte", r"ubyte(\.gz)?")):
        imported(folder, tmp_path / "out" / "store")
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("cut", [-20, 3])
def test_a_damaged_gzip_is_named(tmp_path, which, cut):
    folder = write_pair(tmp_path / "idx", zipped=True)
    file = folder / f"{IDX_NAMES[which]}.gz"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=f"{file.name} is truncated or damaged"):
        imported(folder, tmp_path / "store")
    file.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=f"{file.name} is truncated or damaged"):
        imported(folder, tmp_path / "store")


@pytest.mark.parametrize("which", [0, 1])
def test_one_file_without_the_other_is_refused(tmp_path, which):
    folder = write_pair(tmp_path / "idx")
    (folder / IDX_NAMES[which]).unlink()
    with pytest.raises(DataError, match=f"has {IDX_NAMES[1 - which]} and no {IDX_NAMES[which]}"):
        open_dataset(str(folder))


def test_a_folder_of_neither_says_what_is_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json \(nor the IDX files train-images-idx3-ubyte"):
        open_dataset(str(tmp_path))


def test_the_place_of_fashion_mnist_names_the_package(tmp_path, monkeypatch):
    missing = str(tmp_path / "fashion-mnist")
    monkeypatch.setattr("erd_fast.data.importers.FASHION_MNIST", missing)
    with pytest.raises(DataError, match="is no folder; Debian's package dataset-fashion-mnist makes it"):
        open_dataset(missing)


def test_the_manifest_can_be_read_back(tmp_path):
    store = imported(write_pair(tmp_path / "idx"), tmp_path / "store")
    assert LatentStore(store.path, verify=True).fingerprint == store.fingerprint
