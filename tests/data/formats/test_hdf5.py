"""erd-hdf5: parts, chunks, and what is refused."""

import os
import re

import h5py
import numpy as np
import pytest
import torch

from support import foreign


@pytest.fixture
def file(tmp_path):
    foreign.erd_hdf5(tmp_path / "erd.h5", 24, 4)
    return tmp_path / "erd.h5"


def edit(file, **arrays):
    """Replace arrays; None removes one."""
    with h5py.File(file, "a") as opened:
        for name, array in arrays.items():
            del opened[name]
            if array is not None:
                opened[name] = array


def test_val_is_another_part(file, imported):
    assert len(imported("erd-hdf5", file, split="val")) == 6
    assert len(imported("erd-hdf5", file)) == 24


@pytest.mark.parametrize("how", [{"chunks": (7, 8, 4, 4)}, {"chunks": (150, 4, 2, 4)}, {"compression": "gzip"}])
def test_chunks_and_compression_change_nothing(how, tmp_path, imported):
    foreign.erd_hdf5(tmp_path / "plain.h5", 600, 4)
    foreign.erd_hdf5(tmp_path / "other.h5", 600, 4, **how)
    plain, other = (imported("erd-hdf5", tmp_path / f"{name}.h5") for name in ("plain", "other"))
    assert plain.fingerprint == other.fingerprint


def test_labels_of_16_bits_without_sign_stay_what_they_are(file, imported):
    labels = np.arange(24, dtype=np.uint16) + 40_000
    edit(file, train_labels=labels)
    store = imported("erd-hdf5", file)
    assert store.labels.tolist() == labels.tolist() and store.manifest.num_classes == 40_024


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
def test_floats_of_any_size_and_byte_order(dtype, file, imported):
    before = imported("erd-hdf5", file)
    edit(file, train_latents=foreign.moments(24, 4, foreign.SD_SCALE).astype(dtype))
    after = imported("erd-hdf5", file)
    found, expected = (store.gather(torch.arange(24)) for store in (after, before))
    halves = {"rtol": 2**-11, "atol": 2**-25}  # half a step of float16, of normal numbers and of subnormal ones
    torch.testing.assert_close(found, expected, **(halves if dtype == "<f2" else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_latents": None}, "has no array train_latents; it has train_labels, val_labels, val_latents"),
        ({"train_labels": None}, "has no array train_labels; it has train_latents, val_labels, val_latents"),
        ({"train_labels": np.arange(23)}, r"given train_latents \(24, 8, 4, 4\) and train_labels \(23,\), allowed"),
        ({"train_labels": np.zeros((24, 10), int)}, r"train_labels \(24, 10\), allowed \(N, 8, H, W\) and \(N,\)"),
        ({"train_labels": np.zeros(24)}, "train_labels: given labels float64, allowed whole numbers"),
        ({"train_labels": np.full(24, -1)}, "given label -1 of sample 0, allowed 0 to 2147483647"),
        ({"train_latents": np.zeros((24, 8, 16))}, r"given train_latents \(24, 8, 16\)"),
        ({"train_latents": np.zeros((24, 8, 4, 4), int)}, "train_latents: given latents int64, allowed floats"),
        ({"train_latents": np.zeros((24, 7, 4, 4))}, "given 7 channels, allowed an even number for mean_std"),
        ({"train_latents": np.zeros((0, 8, 4, 4)), "train_labels": np.zeros(0, int)}, "has no samples"),
        ({"train_latents": np.full((24, 8, 4, 4), np.nan)}, "the latents of sample 0 are not finite"),
    ],
)
def test_files_of_another_form_are_refused(arrays, message, file, refused):
    edit(file, **arrays)
    found = refused("erd-hdf5", file)
    assert found.startswith(str(file))
    assert re.search(message, found)


def test_a_group_is_no_array(file, refused):
    with h5py.File(file, "a") as opened:
        del opened["train_labels"]
        opened.create_group("train_labels")
    assert f"{file} has no array train_labels" in refused("erd-hdf5", file)


@pytest.mark.parametrize("part", [0, 0.01, 0.99])
def test_a_truncated_file_is_named(part, file, refused):
    os.truncate(file, int(part * file.stat().st_size))
    assert refused("erd-hdf5", file).startswith(f"{file} as HDF5 cannot be read: ")


def test_damage_within_a_chunk_is_named(tmp_path, refused):
    file = tmp_path / "erd.h5"
    foreign.erd_hdf5(file, 300, 4, chunks=(75, 8, 4, 4), compression="gzip")
    with h5py.File(file) as opened:
        place = opened["train_latents"].id.get_chunk_info(0).byte_offset
    with open(file, "r+b") as stream:
        stream.seek(place)
        stream.write(b"\xff" * 64)
    assert refused("erd-hdf5", file).startswith(f"{file} as HDF5 cannot be read: ")


def test_a_folder_is_no_hdf5_file(tmp_path, refused):
    assert refused("erd-hdf5", tmp_path) == f"{tmp_path}: given a folder, allowed one HDF5 file"
