"""maskdit-lmdb and maskdit-webdataset: flips, parts, pickles, and what is refused."""

import io
import os
import pickle
import tarfile

import lmdb
import numpy as np
import pytest
import torch

from erd_fast.errors import ConfigError
from support import foreign

PICKLE = {"allow_pickle": True}
ROW = foreign.moments(1, 4, foreign.SD_SCALE, logvar=True)[0]


@pytest.fixture
def folder(tmp_path):
    foreign.maskdit_lmdb(tmp_path / "lmdb", 24, 4)
    return tmp_path / "lmdb"


@pytest.fixture
def tars(tmp_path):
    foreign.maskdit_webdataset(tmp_path / "tars", 24, 4)
    return tmp_path / "tars"


def shard(tars, number=1):
    return tars / f"latent_imagenet_512_train-{number:04d}.tar"


def put(folder, key, value):
    """Change one value; None removes it."""
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)


def write_tar(file, **samples):
    """A tar file of samples, each a dict from suffix to bytes."""
    with tarfile.open(file, "w") as tar:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_flips_are_seen_by_labels_that_come_twice(folder, tmp_path, imported):
    foreign.maskdit_lmdb(tmp_path / "plain", 24, 4, mirrored=False)
    foreign.maskdit_lmdb(tmp_path / "one", 2, 4, mirrored=True)  # of one class: nothing can be said
    flips = {name: imported("maskdit-lmdb", tmp_path / name).manifest.flip for name in ("lmdb", "plain", "one")}
    assert flips == {"lmdb": "stored", "plain": "none", "one": "none"}
    rows = imported("maskdit-lmdb", folder).gather(torch.arange(24))
    assert torch.equal(rows[12:], rows[:12].flip(-1))


def test_a_part_is_found_in_the_folder_around_it(tmp_path, imported, refused):
    for split, count in (("train", 8), ("val", 4)):
        foreign.maskdit_lmdb(tmp_path / "both" / split, count, 4)
    assert len(imported("maskdit-lmdb", tmp_path / "both")) == 8
    assert len(imported("maskdit-lmdb", tmp_path / "both", split="val")) == 4
    assert refused("maskdit-lmdb", tmp_path) == f"{tmp_path} has neither data.mdb nor train/data.mdb"


def test_reading_leaves_the_folder_as_it_is_and_needs_no_permission_to_write(folder, imported):
    (folder / "lock.mdb").unlink()
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
    imported("maskdit-lmdb", folder)
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"length", None, "length, which is written last, is missing"),
        (b"length", b"many", "length, which is written last, is b'many', allowed decimal digits"),
        (b"length", b"0", "has no samples"),
        (b"length", b"25", "y-24 is missing"),
        (b"length", b"9" * 19, "y-24 is missing"),
        (b"y-3", None, "y-3 is missing"),
        (b"y-3", b"-1", "y-3 is b'-1', allowed decimal digits"),
        (b"y-3", b"9" * 19, "allowed 0 to 2147483647"),
        (b"y-3", b"9" * 5000, "y-3 is b'99999999999999999999', allowed decimal digits"),
        (b"z-3", None, "z-3 is missing"),
        (b"z-3", b"x" * 511, "z-3: given 511 bytes, allowed 8 x R x R numbers of 4 bytes"),
        (b"z-3", b"", "z-3: given 0 bytes, allowed 8 x R x R numbers of 4 bytes"),
        (b"z-3", b"x" * 32, "z-3: given 8 x 1 x 1 numbers, allowed 8 x 4 x 4 as in the others"),
    ],
)
def test_values_of_another_form_are_named(key, value, message, folder, refused):
    put(folder, key, value)
    found = refused("maskdit-lmdb", folder)
    assert found.startswith(str(folder)) and message in found


def test_a_truncated_lmdb_is_named_and_not_read_beyond_its_end(folder, refused):
    """LMDB maps the file: a page that is not there ends the process with SIGBUS."""
    file = folder / "data.mdb"
    size = file.stat().st_size
    os.truncate(file, size - 4096)
    assert refused("maskdit-lmdb", folder) == (
        f"{folder}/data.mdb is truncated: {size - 4096} bytes, its head promises {size}"
    )
    for content in (b"", b"no lmdb" * 2000):
        file.write_bytes(content)
        assert refused("maskdit-lmdb", folder).startswith(f"{folder} as LMDB cannot be read: ")


def test_pickled_latents_need_to_be_allowed(tars, refused):
    assert "--allow-pickle" in refused("maskdit-webdataset", tars, ConfigError)


def test_one_tar_file_is_a_part(tars, imported):
    store = imported("maskdit-webdataset", shard(tars), **PICKLE)
    assert store.labels.tolist() == foreign.labels_of(24)[10:20].tolist()


def test_flips_of_a_webdataset_are_for_the_user_to_say(tars, imported, refused):
    assert imported("maskdit-webdataset", tars, **PICKLE, flip="stored").manifest.flip == "stored"
    assert "flip: given mirror, allowed for pixels" in refused(
        "maskdit-webdataset", tars, ConfigError, **PICKLE, flip="mirror"
    )


def test_a_missing_tar_file_is_told(tars, imported):
    shard(tars).unlink()
    with pytest.warns(UserWarning, match=rf"{tars}/\*\.tar: 2 of them, numbered up to 2, and 1 is the first"):
        assert len(imported("maskdit-webdataset", tars, **PICKLE)) == 14


def test_tar_files_cut_anywhere_are_named(tars, refused):
    """Cut between two entries, a tar file reads like a shorter one."""
    content = shard(tars).read_bytes()
    with tarfile.open(shard(tars)) as tar:
        entry = tar.getmembers()[6]  # the first of a sample
    for size in (0, 512, entry.offset, entry.offset + 512, entry.offset_data + 1, len(content.rstrip(b"\0"))):
        shard(tars).write_bytes(content[:size])
        assert refused("maskdit-webdataset", tars, **PICKLE).startswith(str(shard(tars))), size


class Call:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


GOOD = {"latent": pickle.dumps(ROW), "cls": b"1"}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a": GOOD, "b": {"latent": GOOD["latent"]}}, "b has no .cls; it has latent"),
        ({"a": {"cls": b"1", "png": b""}}, "a has no .latent; it has cls, png"),
        ({"a": GOOD | {"cls": b"x"}}, "a.cls is b'x', allowed decimal digits"),
        ({"a": GOOD | {"cls": b"9" * 5000}}, "a.cls is b'99999999999999999999', allowed decimal digits"),
        (
            {"a": GOOD | {"latent": pickle.dumps(Call())}},
            "a.latent: its pickle cannot be read: it asks for builtins.ex",
        ),
        ({"a": GOOD | {"latent": pickle.dumps(3)}}, "a.latent: given a pickle of something else, allowed an array"),
        ({"a": GOOD | {"latent": pickle.dumps(ROW[0])}}, "a.latent: given a pickle of something else, allowed an"),
        ({"a": GOOD | {"latent": pickle.dumps(ROW.astype(int))}}, "a: given latents int64, allowed floats"),
        ({"a": GOOD, "b": GOOD | {"latent": pickle.dumps(ROW[:6])}}, "b: given 6 x 4 x 4 numbers, allowed 8 x 4 x 4"),
    ],
)
def test_samples_of_another_form_are_named(samples, message, tmp_path, refused):
    write_tar(tmp_path / "x.tar", **samples)
    found = refused("maskdit-webdataset", tmp_path, **PICKLE)
    assert found.startswith(f"{tmp_path}/x.tar") and message in found


def test_what_holds_no_samples_is_refused(tmp_path, refused):
    assert refused("maskdit-webdataset", tmp_path, **PICKLE) == f"{tmp_path} has no .tar files"
    write_tar(tmp_path / "x.tar")
    assert refused("maskdit-webdataset", tmp_path, **PICKLE) == f"{tmp_path} has no samples, allowed at least one"
    (tmp_path / "x.tar").write_bytes(bytes(10_240)[:-1] + b"\0" + b"text" * 500 + bytes(1024))
    assert "has no samples" in refused("maskdit-webdataset", tmp_path, **PICKLE)


def test_latents_pickled_by_any_protocol(tmp_path, imported):
    for protocol in (3, 4, 5):
        write_tar(tmp_path / f"{protocol}.tar", a=GOOD | {"latent": pickle.dumps(ROW, protocol)})
        store = imported("maskdit-webdataset", tmp_path / f"{protocol}.tar", **PICKLE)
        assert np.array_equal(store.gather(torch.tensor([0]))[0].numpy(), ROW)


def test_a_tar_file_that_may_not_be_read_or_holds_a_name_twice_is_named(tars, refused):
    with tarfile.open(shard(tars), "a") as tar:
        entry = tarfile.TarInfo("0000019.cls")
        tar.addfile(entry, io.BytesIO())
    assert refused("maskdit-webdataset", tars, **PICKLE).startswith(
        f"{shard(tars)} as a tar file cannot be read: 0000019.cls: duplicate file name"
    )
    shard(tars).unlink()
    shard(tars).mkdir()
    assert f"{shard(tars)} as a tar file cannot be read: [Errno 21]" in refused("maskdit-webdataset", tars, **PICKLE)
