"""numpy: one array of all samples, alone, in .npz, in a folder."""

import os
import zipfile

import numpy as np
import pytest
import torch

from erd_fast.errors import ConfigError
from support import foreign

LATENTS = foreign.samples(600, 2, (0.5,) * 4, (1.0,) * 4)
LABELS = foreign.labels_of(600)
SAMPLE = {"kind": "sample"}


def save(path, latents=LATENTS, labels=LABELS):
    """Both, as a folder or as .npz; returns the path."""
    arrays = {name: array for name, array in (("latents", latents), ("labels", labels)) if array is not None}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    path.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        np.asfortranarray,
        lambda x: x.astype(">f4"),
        lambda x: x.astype("f8"),
        lambda x: np.asfortranarray(x.astype(">f8")),
    ],
)
def test_arrays_in_any_order_are_the_same_numbers(change, tmp_path, imported):
    store = imported("numpy", save(tmp_path / "folder", change(LATENTS)), **SAMPLE)
    assert np.array_equal(store.gather(torch.arange(600)).numpy(), LATENTS) and store.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_npz_is_read_as_a_stream(write, dtype, tmp_path, imported):
    write(tmp_path / "x.npz", latents=LATENTS.astype(dtype), labels=LABELS)
    store = imported("numpy", tmp_path / "x.npz", **SAMPLE)
    assert np.array_equal(store.gather(torch.arange(600)).numpy(), LATENTS) and store.labels.tolist() == LABELS.tolist()


def test_labels_from_a_file_of_their_own(tmp_path, imported):
    folder = save(tmp_path / "folder")
    np.save(tmp_path / "other.npy", LABELS[::-1].astype(np.uint16) + 40_000)
    for src in (folder, folder / "latents.npy", save(tmp_path / "x.npz")):
        store = imported("numpy", src, **SAMPLE, labels=tmp_path / "other.npy")
        assert store.labels.tolist() == (LABELS[::-1] + 40_000).tolist()


@pytest.mark.parametrize("name", ["folder", "x.npz"])
def test_without_labels_there_are_no_classes(name, tmp_path, imported, refused):
    src = save(tmp_path / name, labels=None)
    store = imported("numpy", src, **SAMPLE)
    assert store.manifest.num_classes == 0 and not store.labels.any()
    message = refused("numpy", src, ConfigError, **SAMPLE, num_classes=10)
    assert message == f"num_classes: given 10, but {src} has no labels"


@pytest.mark.parametrize("kind", ["sample", "mean_std", "mean_logvar"])
def test_what_floats_are_is_for_the_user_to_say(kind, tmp_path, imported, refused):
    src = save(tmp_path / "folder")
    manifest = imported("numpy", src, kind=kind, scale=(0.5,), shift=(1.0,), vae="mine", flip="stored").manifest
    channels = 4 if kind == "sample" else 2
    assert (manifest.kind, manifest.shape[0], manifest.vae, manifest.flip) == (kind, channels, "mine", "stored")
    assert manifest.scale == (0.5,) * channels and manifest.shift == (1.0,) * channels
    assert refused("numpy", src, ConfigError).startswith(f"kind: given none for the floats of {src}")


def test_bytes_are_pixels(tmp_path, imported, refused):
    pixels = np.arange(600 * 12, dtype=np.int64).reshape(600, 3, 2, 2).astype(np.uint8)
    src = save(tmp_path / "folder", np.asfortranarray(pixels))
    store = imported("numpy", src, dtype="float16", flip="mirror")
    assert (store.manifest.kind, store.manifest.dtype, store.manifest.flip) == ("pixels", "uint8", "mirror")
    assert np.array_equal(store.gather(torch.arange(600)).numpy(), pixels)
    assert "those are pixels" in refused("numpy", src, ConfigError, **SAMPLE)
    for option in ({"scale": (1.0,)}, {"shift": (1.0,)}, {"vae": "x"}, {"dtype": "float32"}):
        message = refused("numpy", src, ConfigError, **option)
        assert message.startswith(f"{next(iter(option))}: given ") and message.endswith(f"but {src} holds pixels")
    message = refused("numpy", save(tmp_path / "last", pixels.transpose(0, 2, 3, 1)))
    assert "given pixels (600, 2, 2, 3), allowed (N, C, H, W) with C 1 or 3" in message


@pytest.mark.parametrize("name", ["folder", "x.npz"])
@pytest.mark.parametrize(
    ("latents", "labels", "message"),
    [
        (np.empty((2, 1, 1, 1), object), None, "given Python objects, which are pickled, allowed an array of numbers"),
        (LATENTS, np.empty(600, object), "given Python objects, which are pickled, allowed an array of numbers"),
        (LATENTS.astype(int), None, "given latents int64, allowed floats"),
        (LATENTS[0], None, "given an array (4, 2, 2), allowed (N, C, H, W)"),
        (LATENTS, LABELS[:-1], "given labels (599,) for 600 samples, allowed (600,)"),
        (LATENTS, LABELS[:, None], "given labels (600, 1) for 600 samples, allowed (600,)"),
        (LATENTS, LABELS.astype(float), "given labels float64, allowed whole numbers"),
        (LATENTS, LABELS.astype("u8") + 2**63, "allowed 0 to 2147483647"),
        (LATENTS[:0], LABELS[:0], "given an array (0, 4, 2, 2) without numbers, allowed (N, C, H, W)"),
        (LATENTS[:, :, :0], LABELS, "given an array (600, 4, 0, 2) without numbers, allowed (N, C, H, W)"),
    ],
)
def test_arrays_of_another_form_are_refused(name, latents, labels, message, tmp_path, refused):
    src = save(tmp_path / name, latents, labels)
    found = refused("numpy", src, **SAMPLE)
    assert found.startswith(str(src)) and message in found


def test_files_that_are_no_arrays_are_named(tmp_path, refused):
    folder = save(tmp_path / "folder")
    file = folder / "latents.npy"
    os.truncate(file, 1000)
    assert refused("numpy", folder, **SAMPLE).startswith(f"{file} is truncated or damaged: 872 bytes for float32")
    file.write_bytes(b"text")
    assert refused("numpy", file, **SAMPLE).startswith(f"{file} is no .npy file: it begins with 74 65")
    file.unlink()
    assert refused("numpy", folder, **SAMPLE).startswith(f"{file} cannot be read: ")
    assert refused("numpy", folder / "labels.npy", **SAMPLE, labels=file).startswith(f"{file} cannot be read: ")


def test_npz_files_of_another_form_are_named(tmp_path, refused):
    file = tmp_path / "x.npz"
    np.savez(file, images=LATENTS)
    assert refused("numpy", file, **SAMPLE) == f"{file} has no array latents; it has images"
    np.savez(file, latents=np.asfortranarray(LATENTS))
    assert "given an array in Fortran order, allowed C order" in refused("numpy", file, **SAMPLE)
    file.write_bytes(b"no zip")
    assert refused("numpy", file, **SAMPLE).startswith(f"{file} as .npz cannot be read: ")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("latents.npy", foreign.npy_bytes(LATENTS)[:-1000])
    assert refused("numpy", file, **SAMPLE) == f"{file}: latents is truncated: it ends within sample 584"


def test_a_damaged_stream_is_named(tmp_path, refused):
    file = save(tmp_path / "x.npz")
    content = bytearray(file.read_bytes())
    content[content.index(LATENTS.tobytes())] ^= 1
    file.write_bytes(content)
    assert refused("numpy", file, **SAMPLE).startswith(f"{file}: latents cannot be read: Bad CRC-32")
