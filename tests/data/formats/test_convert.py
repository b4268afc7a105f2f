"""convert: dtypes, classes, what the user says instead of the format, memory."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from erd_fast.data import LatentStore, writer
from erd_fast.data.formats import convert
from erd_fast.data.formats.convert import write_source
from erd_fast.data.formats.source import ImportOptions, Source
from erd_fast.data.importers import import_dataset
from erd_fast.errors import ConfigError, DataError, RunError
from support import foreign

SAMPLE = {"kind": "sample"}


@pytest.fixture
def src(tmp_path):
    np.save(tmp_path / "x.npy", foreign.samples(8, 2, (1.0,) * 4))
    return tmp_path / "x.npy"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_latents_are_written_in_the_dtype_asked_for(dtype, src, imported):
    store = imported("numpy", src, **SAMPLE, dtype=dtype)
    wanted = torch.from_numpy(np.load(src)).to(getattr(torch, dtype))
    assert store.manifest.dtype == dtype and torch.equal(store.gather(torch.arange(8)), wanted)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, "float16", "the latents of sample 5 are not finite, allowed finite numbers; float16 ends at 65504"),
        (1e39, "float32", "the latents of sample 5 are not finite, allowed finite numbers"),
        (np.nan, "float32", "the latents of sample 5 are not finite, allowed finite numbers"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_the_file_and_the_sample(value, dtype, message, src, refused):
    latents = np.load(src).astype(np.float64)
    latents[5, 0, 0, 0] = value
    np.save(src, latents)
    assert refused("numpy", src, **SAMPLE, dtype=dtype).startswith(f"{src}: {message}")


def test_values_beyond_float16_fit_into_others(src, imported):
    np.save(src, np.full((1, 4, 2, 2), 7e4))
    assert imported("numpy", src, **SAMPLE, dtype="bfloat16").manifest.dtype == "bfloat16"


def test_classes_are_as_many_as_labels_need_or_as_told(tmp_path, imported, refused):
    foreign.numpy_folder(tmp_path / "folder")
    assert imported("numpy", tmp_path / "folder", **SAMPLE).manifest.num_classes == 10
    assert imported("numpy", tmp_path / "folder", **SAMPLE, num_classes=1000).manifest.num_classes == 1000
    message = refused("numpy", tmp_path / "folder", **SAMPLE, num_classes=9)
    assert message == f"{tmp_path}/folder: given label 9 of sample 22, allowed 0 to 8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (1.0, 2.0)}, "scale: given 2 numbers, allowed 1 or 4, one for each channel"),
        ({"shift": (1.0, 2.0, 3.0)}, "shift: given 3 numbers, allowed 1 or 4, one for each channel"),
        ({"scale": (0.0,)}, "scale: given (0.0,), allowed finite numbers, not 0"),
        ({"scale": (float("inf"),)}, "scale: given (inf,), allowed finite numbers, not 0"),
        ({"shift": (float("nan"),)}, "shift: given (nan,), allowed finite numbers"),
        ({"flip": "mirror"}, "flip: given mirror, allowed for pixels"),
    ],
)
def test_scales_that_do_not_fit_are_refused(options, message, src, refused):
    assert refused("numpy", src, ConfigError, **SAMPLE, **options).startswith(message)


def test_what_the_user_says_takes_the_place_of_the_format(tmp_path, imported, refused):
    foreign.edm2(tmp_path / "edm2", 4, 2)
    manifest = imported("edm2", tmp_path / "edm2", scale=(0.5, 1.0, 2.0, -4.0), shift=(0.0,), vae="other").manifest
    assert (manifest.scale, manifest.shift, manifest.vae) == ((0.5, 1.0, 2.0, -4.0), (0.0,) * 4, "other")
    assert manifest.vae_source == ""  # that of the format is another one


def test_an_autoencoder_that_can_be_found_later_is_recorded(src, tmp_path, imported, monkeypatch):
    (tmp_path / "vae").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, source in (("vae", str(tmp_path / "vae")), ("owner/name", "owner/name"), ("my own", ""), (None, "")):
        manifest = imported("numpy", src, **SAMPLE, vae=given).manifest
        assert (manifest.vae, manifest.vae_source) == (given or "", source)


def test_scales_for_each_channel_need_as_many_channels(tmp_path, refused, imported):
    foreign.edm2(tmp_path / "edm2", 4, 2)
    for file in (tmp_path / "edm2").rglob("*.npy"):
        np.save(file, np.tile(np.load(file), (2, 1, 1)))
    message = refused("edm2", tmp_path / "edm2")
    assert message == f"{tmp_path}/edm2 has 8 channels, its format 4: give --scale and --shift"
    assert imported("edm2", tmp_path / "edm2", scale=(1.0,), shift=(2.0,)).manifest.shift == (2.0,) * 8


def test_a_shard_is_no_larger_than_memory_should_hold(src, imported, monkeypatch):
    whole = imported("numpy", src, **SAMPLE)
    monkeypatch.setattr(convert, "_SHARD_BYTES", 3 * 4 * 2 * 2 * 4)  # three samples in fp32
    parts = imported("numpy", src, **SAMPLE)
    assert [shard.count for shard in parts.manifest.shards] == [3, 3, 2]
    assert torch.equal(parts.gather(torch.arange(8)), whole.gather(torch.arange(8)))


def test_the_source_is_closed_when_something_is_refused(tmp_path):
    closed = []

    def batches():
        try:
            yield np.zeros((2, 4, 2, 2)), np.array([0, -1])
            yield np.zeros((2, 4, 2, 2)), np.array([0, 1])
        finally:
            closed.append(True)

    source = Source(batches(), kind="sample", count=4)
    with pytest.raises(DataError, match="src: given label -1 of sample 1"):
        write_source(source, Path("src"), tmp_path / "store", ImportOptions())
    assert closed == [True]


def test_an_interrupted_import_leaves_nothing(src, tmp_path, imported, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("erd_fast.data.writer.write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imported("numpy", src, **SAMPLE)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(src, tmp_path, imported, monkeypatch):
    def full(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("erd_fast.data.writer.save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*shard-00000.safetensors: No space left on device"):
        imported("numpy", src, **SAMPLE)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_of_two_writers_the_first_to_end_is_kept(src, tmp_path, imported, monkeypatch, same):
    """The second one says so, unless it has the same data."""
    other, real, ended = tmp_path / "other.npy", writer.write_shard, []
    np.save(other, np.load(src) if same else -np.load(src))
    options = ImportOptions(kind="sample", dtype="float32")

    def overtaken(*arguments):
        if not ended:
            ended.append(None)
            import_dataset("numpy", other, tmp_path / "out" / "store-0", options)
        return real(*arguments)

    monkeypatch.setattr(writer, "write_shard", overtaken)
    if same:
        imported("numpy", src, **SAMPLE)
    else:
        with pytest.raises(DataError, match="store-0 was made by another process meanwhile, of other data"):
            imported("numpy", src, **SAMPLE)
    (store,) = (tmp_path / "out").iterdir()
    assert torch.equal(LatentStore(store).gather(torch.arange(8)), torch.from_numpy(np.load(other)))


def test_a_folder_that_cannot_be_made_is_one_message(src, tmp_path, imported):
    (tmp_path / "out").write_text("")  # a file where the folder should be
    with pytest.raises(RunError, match="cannot create the folder"):
        imported("numpy", src, **SAMPLE)
