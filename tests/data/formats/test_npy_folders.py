"""fast-dit and uvit: order, pairs, pickles, and what is refused."""

import pickle
import re
import warnings

import numpy as np
import pytest
import torch

from erd_fast.data.formats import npy_folders
from erd_fast.errors import ConfigError
from support import foreign

PICKLE = {"allow_pickle": True}


@pytest.fixture
def fast_dit(tmp_path):
    foreign.fast_dit(tmp_path / "fast-dit", 12, 4)
    return tmp_path / "fast-dit"


@pytest.fixture
def features(fast_dit):
    return fast_dit / "imagenet256_features"


@pytest.fixture
def uvit(tmp_path):
    foreign.uvit(tmp_path / "uvit", 24, 4)
    return tmp_path / "uvit"


def test_fast_dit_latents_are_those_of_the_autoencoder_and_not_scaled_a_second_time(fast_dit, imported):
    store = imported("fast-dit", fast_dit)
    assert (store.manifest.scale, store.manifest.shift) == ((0.18215,) * 4, ())
    stored = store.gather(torch.tensor([0]))[0].numpy()
    scaled = np.load(fast_dit / "imagenet256_features" / "0.npy")[0]
    np.testing.assert_allclose(stored, scaled / 0.18215, rtol=2**-23)


def test_files_are_paired_by_name_and_come_in_the_order_of_text(fast_dit, features, imported):
    labels = fast_dit / "imagenet256_labels"
    for number in range(12):
        np.save(labels / f"{number}.npy", np.array([number]))
    assert imported("fast-dit", fast_dit).labels.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert imported("fast-dit", features).labels.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("missing", "there"), [("labels", "features"), ("features", "labels")])
def test_a_file_without_its_partner_is_named(missing, there, fast_dit, refused):
    for number in (3, 11):
        (fast_dit / f"imagenet256_{missing}" / f"{number}.npy").unlink()
    assert refused("fast-dit", fast_dit) == (
        f"{fast_dit}/imagenet256_{there} has 11.npy and {fast_dit}/imagenet256_{missing} does not (files like it: 2)"
    )


def test_numbers_with_gaps_are_told(fast_dit, features, uvit, imported):
    (features / "7.npy").unlink()
    (fast_dit / "imagenet256_labels" / "7.npy").unlink()
    with pytest.warns(UserWarning, match=rf"{features}/\*\.npy: 11 of them, numbered up to 11, and 7 is the first"):
        assert len(imported("fast-dit", fast_dit)) == 11
    (uvit / "0.npy").unlink()
    with pytest.warns(UserWarning, match=rf"{uvit}/\*\.npy: 23 of them, numbered up to 23, and 0 is the first that"):
        assert len(imported("uvit", uvit, **PICKLE)) == 23


@pytest.mark.parametrize(("images", "gpus"), [(47, 4), (48, 4), (12, None), (600, 50)])
def test_as_many_files_as_one_of_several_gpus_writes_are_told(images, gpus, fast_dit, imported, monkeypatch):
    monkeypatch.setattr(npy_folders, "IMAGENET", images)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        imported("fast-dit", fast_dit)
    messages = [str(warning.message) for warning in told]
    assert len(messages) == (gpus is not None)
    assert all(f"12 files are 1 of {gpus} parts of ImageNet" in message for message in messages)


def test_which_folder_is_meant_must_be_clear(fast_dit, features, tmp_path, refused):
    (fast_dit / "imagenet512_features").mkdir()
    message = refused("fast-dit", fast_dit)
    assert "found imagenet256_features, imagenet512_features, allowed one folder NAME_features" in message
    assert f"{fast_dit}/imagenet512_labels is no folder" in refused("fast-dit", fast_dit / "imagenet512_features")
    assert f"{tmp_path}: found none, allowed one folder NAME_features" in refused("fast-dit", tmp_path)
    assert "0.npy is no folder, allowed one with imagenet256_features" in refused("fast-dit", features / "0.npy")


def test_folders_without_arrays_are_refused(tmp_path, refused):
    for name in ("x_features", "x_labels"):
        (tmp_path / name).mkdir()
    assert refused("fast-dit", tmp_path) == f"{tmp_path}/x_features has no .npy files, allowed 0.npy, 1.npy ..."
    assert refused("uvit", tmp_path, **PICKLE) == f"{tmp_path} has no files 0.npy, 1.npy ..."


@pytest.mark.parametrize("change", [np.asfortranarray, lambda x: x.astype(">f4"), lambda x: x.astype("f8")])
def test_arrays_in_any_order_are_the_same_numbers(change, fast_dit, features, imported):
    before = imported("fast-dit", fast_dit)
    for file in features.iterdir():
        np.save(file, change(np.load(file)))
    assert imported("fast-dit", fast_dit).fingerprint == before.fingerprint


ROW = foreign.samples(1, 4, (1.0,) * 4)


@pytest.mark.parametrize(
    ("where", "content", "message"),
    [
        ("features/3.npy", foreign.npy_bytes(ROW)[:-1], "3.npy is truncated or damaged: 255 bytes for float32"),
        ("features/3.npy", b"", "3.npy is no .npy file: it begins with nothing"),
        ("features/3.npy", foreign.npy_bytes(ROW[:, :3]), "3.npy: given 1 x 3 x 4 x 4 numbers, allowed 1 x 4 x 4 x 4"),
        ("features/0.npy", foreign.npy_bytes(ROW[0]), r"0.npy: given an array (4, 4, 4), allowed (1, 4, 32, 32)"),
        ("features/0.npy", foreign.npy_bytes(ROW.astype(int)), "0.npy: given latents int64, allowed floats"),
        ("features/0.npy", foreign.pickled_npy(1, 2), "0.npy: given Python objects, which are pickled, allowed an"),
        ("labels/3.npy", foreign.npy_bytes(np.zeros(1)), "3.npy: given labels float64, allowed whole numbers"),
        ("labels/3.npy", foreign.npy_bytes(np.zeros(2, int)), "labels/3.npy: given 2 numbers, allowed 1"),
        ("labels/3.npy", foreign.npy_bytes(np.array(0)), "labels/3.npy: given 1 numbers, allowed 1"),
    ],
)
def test_a_damaged_file_of_fast_dit_is_named(where, content, message, fast_dit, refused):
    (fast_dit / f"imagenet256_{where}").write_bytes(content)
    found = refused("fast-dit", fast_dit)
    assert found.startswith(f"{fast_dit}/imagenet256_") and message in found


def test_uvit_comes_in_the_order_of_numbers(uvit, imported):
    store = imported("uvit", uvit, **PICKLE)
    originals = foreign.moments(12, 4, foreign.SD_SCALE, logvar=True)
    rows = store.gather(torch.arange(24)).numpy()
    assert np.array_equal(rows[:8], originals[:8]) and np.array_equal(rows[8:16], originals[:8, ..., ::-1])


def test_pickles_need_to_be_allowed(uvit, refused):
    assert "--allow-pickle" in refused("uvit", uvit, ConfigError)


def test_a_pickle_of_numpy_1_is_read(uvit, imported):
    before = imported("uvit", uvit, **PICKLE)
    array = np.empty(2, object)
    array[:] = foreign.moments(12, 4, foreign.SD_SCALE, logvar=True)[0], np.int64(0)
    old = pickle.dumps(array, 3).replace(b"numpy._core", b"numpy.core")  # names are lines of text in protocol 3
    head = foreign.pickled_npy(1, 2).partition(b"\n")[0] + b"\n"
    (uvit / "0.npy").write_bytes(head + old)
    assert b"numpy.core" in old and imported("uvit", uvit, **PICKLE).fingerprint == before.fingerprint


class Call:
    """Something that a pickle would call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (foreign.npy_bytes(ROW[0]), "given an array of numbers, allowed a pickled pair (moments, label)"),
        (foreign.pickled_npy(ROW[0]), "given a pickle of something else, allowed a pair"),
        (foreign.pickled_npy(ROW, 1), "given a pickle of something else, allowed a pair"),
        (foreign.pickled_npy(1, ROW[0]), "given a pickle of something else, allowed a pair"),
        (foreign.pickled_npy(ROW[0], 1.5), "given labels float64, allowed whole numbers"),
        (foreign.pickled_npy(ROW[0], -1), "given label -1, allowed 0 to 2147483647"),
        (foreign.pickled_npy(ROW[0].astype(int), 1), "given latents int64, allowed floats"),
        (foreign.pickled_npy(ROW[0], "cat"), "its pickle cannot be read: it holds a str, allowed arrays and numbers"),
        (foreign.pickled_npy(ROW[0], 1)[:-9], "its pickle cannot be read: "),
        (foreign.pickled_npy(ROW[0], Call(exec, "raise SystemExit('ran')")), "it asks for builtins.exec, allowed"),
        (b"no array", "is no .npy file: it begins with 6e 6f"),
    ],
)
def test_a_damaged_file_of_uvit_is_named(content, message, uvit, refused):
    (uvit / "3.npy").write_bytes(content)
    found = refused("uvit", uvit, **PICKLE)
    assert found.startswith(f"{uvit}/3.npy") and re.search(re.escape(message), found)


def test_moments_of_another_size_are_named(uvit, refused):
    (uvit / "5.npy").write_bytes(foreign.pickled_npy(foreign.moments(1, 8, foreign.SD_SCALE)[0], 1))
    assert (
        refused("uvit", uvit, **PICKLE) == f"{uvit}/5.npy: given 8 x 8 x 8 numbers, allowed 8 x 4 x 4 as in the others"
    )
