"""store: what was written comes back, and what is damaged is named."""

import json
import os
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erd_fast.data import LatentStore, write_store
from erd_fast.errors import DataError

COUNT, CLASSES = 23, 5
LABELS = torch.arange(COUNT) * 3 % CLASSES


def _latents(dtype: torch.dtype = torch.float16, channels: int = 2) -> torch.Tensor:
    values = torch.randn(COUNT, channels, 3, 4, generator=torch.Generator().manual_seed(0))
    return (values * 40 + 128).clamp(0, 255).to(dtype)


def _write(path: Path, latents: torch.Tensor | None = None, labels: torch.Tensor = LABELS, **how) -> LatentStore:
    latents = _latents() if latents is None else latents
    return write_store(path, [(latents, labels)], **{"kind": "sample", "num_classes": CLASSES, "shard_size": 10, **how})


@pytest.fixture
def store(tmp_path) -> LatentStore:
    """Three shards of 10, 10 and 3 rows."""
    return _write(tmp_path / "store")


def _edit(store: LatentStore, **fields) -> None:
    """Change manifest fields; None removes one."""
    file = store.path / "manifest.json"
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float16, "sample"),
        (torch.bfloat16, "sample"),
        (torch.float32, "sample"),
        (torch.float16, "mean_std"),
        (torch.float32, "mean_logvar"),
        (torch.uint8, "pixels"),
    ],
)
@pytest.mark.parametrize("shard_size", [7, 23, 100])
def test_rows_and_labels_come_back(tmp_path, dtype, kind, shard_size):
    latents = _latents(dtype)
    _write(tmp_path / "store", latents, kind=kind, shard_size=shard_size)
    store = LatentStore(tmp_path / "store")
    found = torch.cat(list(store.shards()))
    assert found.dtype == dtype and torch.equal(found, latents)
    assert torch.equal(store.labels, LABELS) and store.labels.dtype == torch.int64
    assert len(store) == COUNT
    assert len(store.manifest.shards) == -(-COUNT // shard_size)
    assert store.manifest.shape == ((1 if kind.startswith("mean_") else 2), 3, 4)
    assert store.manifest.channels_stored == 2


def test_the_manifest_says_what_was_given(tmp_path):
    described = {
        "class_names": ("a", "b", "c", "d", "e"),
        "scale": (0.5, 2.0),
        "shift": (1.0, -1.0),
        "vae": "sd-vae",
        "vae_source": "owner/name",
        "pixel_range": (0.0, 1.0),
        "crop": "center",
        "flip": "stored",
    }
    manifest = LatentStore(_write(tmp_path / "store", **described).path).manifest
    assert {name: getattr(manifest, name) for name in described} == described


def test_shards_are_plain_safetensors(store):
    shard = load_file(store.path / "shard-00001.safetensors")
    assert torch.equal(shard["latents"], _latents()[10:20])
    assert shard["labels"].dtype == torch.int32 and torch.equal(shard["labels"].long(), LABELS[10:20])


def test_batches_of_any_sizes_make_the_same_store(tmp_path, store):
    sizes = (1, 14, 0, 2, 6)
    parts = list(zip(_latents().split(sizes), LABELS.split(sizes), strict=True))
    other = write_store(tmp_path / "parts", iter(parts), kind="sample", num_classes=CLASSES, shard_size=10)
    assert other.manifest == store.manifest and other.fingerprint == store.fingerprint


@pytest.mark.parametrize("index", [[0], [22, 0, 10, 9, 9, 20, 19], list(range(COUNT))[::-1], []])
def test_gather_across_shards_is_indexing(tmp_path, store, index):
    index = torch.tensor(index, dtype=torch.int64)
    whole = _write(tmp_path / "whole", shard_size=100)
    assert torch.equal(store.gather(index), _latents()[index])
    assert torch.equal(whole.gather(index), _latents()[index])
    given = torch.full((len(index), 2, 3, 4), float("nan"), dtype=torch.float16)
    assert store.gather(index, given) is given and torch.equal(given, _latents()[index])


def test_gathered_rows_are_copies_and_nothing_reaches_the_files(store):
    before = [file.read_bytes() for file in sorted(store.path.iterdir())]
    rows = store.gather(torch.tensor([3, 15]))
    rows.zero_()
    assert torch.equal(store.gather(torch.tensor([3, 15])), _latents()[[3, 15]])
    for shard in store.shards():
        shard.zero_()
    assert [file.read_bytes() for file in sorted(store.path.iterdir())] == before


@pytest.mark.parametrize("dumps", [pickle.dumps, ForkingPickler.dumps])
def test_a_pickled_store_is_its_path_and_stays_as_it_is(store, dumps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = LatentStore(store.path.relative_to(tmp_path))
    content = bytes(dumps(relative))
    monkeypatch.chdir("/")
    for same in (pickle.loads(content), store):
        assert torch.equal(same.gather(torch.arange(COUNT)), _latents()) and torch.equal(same.labels, LABELS)
    assert len(content) < 1000 and not pickle.loads(content).labels.is_shared()


def test_the_fingerprint_is_of_the_content_and_not_of_names(tmp_path, store):
    copy = shutil.copytree(store.path, tmp_path / "copy")
    assert LatentStore(copy).fingerprint == store.fingerprint
    named = _write(tmp_path / "named", class_names=tuple("abcde"), vae="x", vae_source="/x")
    assert named.fingerprint == store.fingerprint
    changed = _latents()
    changed[22, 1, 2, 3] += 1
    others = [
        _write(tmp_path / "row", changed),
        _write(tmp_path / "label", labels=LABELS.roll(1)),
        _write(tmp_path / "scale", scale=(2.0, 1.0)),
        _write(tmp_path / "flip", flip="stored"),
        _write(tmp_path / "classes", num_classes=CLASSES + 1),
        _write(tmp_path / "kind", kind="mean_std"),
    ]
    assert len({store.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_an_existing_folder_is_refused_and_kept(store):
    with pytest.raises(DataError, match=r"store exists already"):
        _write(store.path, _latents() + 1)
    assert torch.equal(LatentStore(store.path).gather(torch.arange(COUNT)), _latents())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"labels": LABELS + 1}, r"label 5 of sample \d+, allowed 0 to 4"),
        ({"labels": LABELS - 1}, r"label -1 of sample 0, allowed 0 to 4"),
        ({"num_classes": 0}, r"label 3 of sample 1, allowed 0 alone"),
        ({"num_classes": -1, "labels": LABELS * 0}, r"num_classes: given -1, allowed 0 or more"),
        ({"labels": LABELS[:-1], "shard_size": 100}, r"given latents \(23, 2, 3, 4\) and labels \(22,\)"),
        ({"latents": _latents()[0]}, r"given latents \(2, 3, 4\)"),
        ({"latents": _latents(torch.float64)}, r"latents torch.float64, allowed float16, bfloat16, float32, uint8"),
        ({"latents": _latents(torch.uint8)}, r"dtype: given 'uint8', allowed uint8 for pixels and for them alone"),
        ({"kind": "pixels"}, r"dtype: given 'float16', allowed uint8 for pixels"),
        ({"kind": "mean"}, r"kind: given 'mean', allowed sample, mean_std, mean_logvar, pixels"),
        (
            {"latents": _latents(channels=3), "kind": "mean_std"},
            r"latents: given F16 \(10, 3, 3, 4\), the manifest says",
        ),
        ({"scale": (1.0,) * 3}, r"scale: given .*, allowed one number for each of 2 channels, or none"),
        ({"class_names": ("a",)}, r"class_names: given .*, allowed 5 names or none"),
        ({"labels": LABELS + 0.5}, r"labels torch.float32, allowed whole numbers"),
        ({"labels": LABELS.long() + (1 << 32)}, r"label 429496729\d of sample 0"),
        ({"shard_size": 0}, r"shard_size: given 0, allowed 1 or more"),
        ({"scale": (1.0, float("nan"))}, r"scale: given .*, allowed a list of numbers"),
        ({"flip": "yes"}, r"flip: given 'yes', allowed none, mirror, stored"),
    ],
)
def test_what_is_not_allowed_is_refused_and_leaves_nothing(tmp_path, how, message):
    with pytest.raises(DataError, match=message):
        _write(tmp_path / "store", **how)
    assert list(tmp_path.iterdir()) == []


def test_no_samples_are_no_store(tmp_path):
    with pytest.raises(DataError, match="no samples given"):
        write_store(tmp_path / "store", [], kind="sample", num_classes=0)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_batches_leaves_nothing(tmp_path):
    def batches():
        yield _latents(), LABELS
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_store(tmp_path / "store", batches(), kind="sample", num_classes=CLASSES, shard_size=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": None}, "field 'kind' is missing"),
        ({"count": None}, "field 'count' is missing"),
        ({"colour": 1}, "unknown field 'colour'; allowed: kind, shape"),
        ({"format_version": 2}, "format_version 2; this version of erd-fast reads 1"),
        ({"format_version": None}, "format_version None"),
        ({"count": 24}, "count: given 24, allowed the sum of the shards' counts, 23"),
        ({"count": "many"}, "count: given 'many'"),
        ({"shape": [2, 3]}, "shape: given"),
        ({"shape": "2x3x4"}, "shape: given '2x3x4'"),
        ({"shape": [2, 4, 3]}, r"latents: given F16 \(10, 2, 3, 4\), the manifest says float16 \(10, 2, 4, 3\)"),
        ({"dtype": "bfloat16"}, "latents: given F16 .*, the manifest says bfloat16"),
        ({"dtype": ["float16"]}, "dtype: given"),
        ({"dtype": {"a": 1}}, "manifest.json: "),
        ({"num_classes": 4}, "label 4 of sample 3; allowed 0 to 3"),
        ({"scale": 2}, "manifest.json: "),
        ({"shards": [1]}, "manifest.json: "),
        ({"shards": [{"file": "shard-00000.safetensors"}]}, "manifest.json: "),
        ({"shards": [{"file": "shard-00000.safetensors", "count": "1", "bytes": 1, "sha256": ""}]}, "manifest.json: "),
        ({"shards": []}, "count: given 23, allowed .* 0, at least 1"),
        ({"vae_source": 5}, r"vae_source: given 5, allowed text"),
        ({"pixel_range": [1, -1]}, r"pixel_range: given \(1, -1\), allowed two numbers, the smaller one first"),
    ],
)
def test_a_manifest_that_is_not_right_names_the_field(store, fields, message):
    _edit(store, **fields)
    with pytest.raises(DataError, match=message):
        LatentStore(store.path)


def test_a_manifest_of_before_autoencoders_were_recorded_is_read(store):
    _edit(store, vae_source=None)
    before = LatentStore(store.path)
    assert "vae_source" not in json.loads((store.path / "manifest.json").read_text())
    assert before.manifest.vae_source == "" and before.fingerprint == store.fingerprint


@pytest.mark.parametrize("content", ["[]", "{", "", "\0"])
def test_a_manifest_that_is_no_json_object_is_named(store, content):
    (store.path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        LatentStore(store.path)


def test_other_folders_are_no_stores(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=f"{path} is no latent store: it has no manifest.json"):
            LatentStore(path)


def test_a_missing_shard_is_named(store):
    (store.path / "shard-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00002.safetensors is missing"):
        LatentStore(store.path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(store, size):
    file = store.path / "shard-00001.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    with pytest.raises(DataError, match=r"shard-00001.safetensors is truncated or altered: \d+ bytes"):
        LatentStore(store.path)


def test_an_altered_byte_is_found_by_its_sum(store):
    file = store.path / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00001.safetensors was altered: sha256"):
        LatentStore(store.path)
    unchecked = LatentStore(store.path, verify=False)
    with pytest.raises(DataError, match=r"was altered"):
        unchecked.verify()


def test_sums_of_large_stores_are_compared_on_request_alone(store, monkeypatch):
    monkeypatch.setattr("erd_fast.data.store._HASH_AT_OPEN", 100)
    with open(store.path / "shard-00002.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xaa")
    LatentStore(store.path)
    with pytest.raises(DataError, match=r"shard-00002.safetensors was altered"):
        LatentStore(store.path, verify=True)


def test_any_altered_byte_of_a_shards_header_is_an_error_and_no_crash(tmp_path):
    store = _write(tmp_path / "store", shard_size=100)
    file = store.path / "shard-00000.safetensors"
    right = file.read_bytes()
    for place in range(8 + int.from_bytes(right[:8], "little")):
        for bits in (0x01, 0x80, 0xFF):
            altered = bytearray(right)
            altered[place] ^= bits
            file.write_bytes(altered)
            with pytest.raises(DataError, match=r"shard-00000"):
                LatentStore(store.path)


def test_a_read_only_store_opens(store):
    files = [*store.path.iterdir(), store.path]
    for path in files:
        path.chmod(0o555)
    try:
        assert torch.equal(LatentStore(store.path).gather(torch.arange(COUNT)), _latents())
    finally:
        store.path.chmod(0o755)
