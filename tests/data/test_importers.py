"""importers: the bundled data, and the names that data.path may have."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from erd_fast.data import BUNDLED, LatentStore, importers, open_dataset
from erd_fast.errors import DataError


def test_digits_are_the_images_of_scikit_learn(digits):
    manifest, source = digits.manifest, load_digits()
    assert (len(digits), manifest.kind, manifest.shape, manifest.dtype) == (1797, "pixels", (1, 8, 8), "uint8")
    assert (manifest.num_classes, manifest.class_names) == (10, tuple("0123456789"))
    assert torch.equal(digits.labels, torch.from_numpy(source.target))
    pixels = digits.gather(torch.arange(1797))
    assert pixels.dtype == torch.uint8 and (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels[:, 0].numpy() / 255 - source.images / 16).max() <= 0.5 / 255


def test_first_use_imports_into_the_cache_and_second_use_reads_it(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path))
    first = open_dataset("digits")
    assert first.path == tmp_path / "stores" / "digits"
    assert first.fingerprint == digits.fingerprint
    monkeypatch.setitem(BUNDLED, "digits", lambda path: pytest.fail("imported again"))
    assert open_dataset("digits").fingerprint == first.fingerprint
    assert open_dataset(str(first.path)).path == first.path


def test_an_import_that_another_process_finished_first_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path))

    def overtaken(path):
        importers.import_digits(path)
        return importers.import_digits(path)

    monkeypatch.setitem(BUNDLED, "digits", overtaken)
    assert len(open_dataset("digits")) == 1797


def test_a_folder_of_a_bundled_name_is_asked_for_by_its_path(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a run folder, say
    assert open_dataset("digits").fingerprint == digits.fingerprint
    with pytest.raises(DataError, match="digits is no latent store"):
        open_dataset("./digits")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError, match=r"data\.path: digit is no folder, and .*did you mean 'digits'\?"):
        open_dataset("digit")


def test_a_damaged_store_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path))
    store: LatentStore = open_dataset("digits")
    (store.path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=f"{store.path}/shard-00000.safetensors is truncated"):
        open_dataset("digits")
