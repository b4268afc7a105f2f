"""dali: the pipeline itself, its checkpoints, and tars of other projects."""

import functools
import itertools
import sys
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from erd_fast.data import LatentStore, open_reader, write_store
from erd_fast.data.dali import DaliReader
from erd_fast.data.dali_tars import DaliTars, RawLatents
from erd_fast.errors import ConfigError, DataError
from erd_fast.training.loop import train

CPU = torch.device("cpu")
COUNT = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LatentStore:
    latents = torch.arange(float(COUNT))[:, None, None, None].expand(COUNT, 1, 2, 2).bfloat16()
    path = tmp_path_factory.mktemp("dali") / "store"
    return write_store(path, [(latents, torch.arange(COUNT) % 7)], kind="sample", num_classes=7, shard_size=15)


def _plan(number: int) -> torch.Tensor:
    return (torch.arange(4) * 11 + number) % COUNT


def _run(pipeline) -> tuple[list[float], list[int]]:
    latents, labels = (torch.from_dlpack(output.as_tensor()) for output in pipeline.run())
    return latents.view(torch.bfloat16)[:, 0, 0, 0].tolist(), labels.tolist()


def _expected(number: int) -> tuple[list[float], list[int]]:
    return _plan(number).tolist(), (_plan(number) % 7).tolist()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_checkpoint_of_the_pipeline_is_a_start_at_its_batch(store, taken):
    reader = DaliReader(store, CPU)
    pipeline = reader.pipeline(_plan, 5)
    assert [_run(pipeline) for _ in range(taken)] == [_expected(5 + number) for number in range(taken)]
    restored = reader.pipeline(_plan, 5, checkpoint=pipeline.checkpoint())
    anew = reader.pipeline(_plan, 5 + taken)
    for number in range(5 + taken, 10 + taken):
        assert _run(restored) == _run(anew) == _expected(number)


def test_a_run_with_dali_is_the_run_without(tmp_path, tiny, training_lines):
    for loader in ("resident", "dali"):
        train(tiny(train={"steps": 3}, data={"loader": loader}), tmp_path / loader)
    assert training_lines(tmp_path / "dali") == training_lines(tmp_path / "resident")


def test_without_the_package_the_extra_is_named(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for use in (lambda: open_reader(store, "dali", CPU), lambda: DaliTars([], 1)):
        with pytest.raises(ConfigError, match=r": nvidia.dali is not installed: pip install 'erd-fast\[dali\]'"):
            use()


SHAPE = (2, 3, 4)
RAW = {dtype: RawLatents("latent", SHAPE, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
NPY = (torch.float16, torch.float32)  # NumPy has no bfloat16


def _latent(number: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(24.0).view(SHAPE) / 8 + number).to(dtype)


def _write(path: Path, numbers: range, dtype: torch.dtype, raw: bool, **other: Callable[[int], Any]) -> Path:
    """Samples ``numbers`` of class ``number % 7``; ``other`` are files of other content, or None, by extension."""
    with webdataset.TarWriter(str(path)) as tar:
        for number in numbers:
            latent = _latent(number, dtype)
            content = {"latent": latent.view(torch.uint8).numpy().tobytes()} if raw else {"npy": latent.numpy()}
            content |= {"cls": str(number % 7), "json": {"number": number}}
            content |= {ext: make(number) for ext, make in other.items()}
            tar.write(
                {"__key__": f"{number:06d}", **{ext: value for ext, value in content.items() if value is not None}}
            )
    return path


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Callable[..., list[Path]]:
    """``tars(dtype, raw)``: two files of 20 samples together."""
    folder = tmp_path_factory.mktemp("tars")

    @functools.cache
    def make(dtype: torch.dtype = torch.float32, raw: bool = False) -> list[Path]:
        name = f"{str(dtype)[6:]}-{raw}"
        parts = (range(11), range(11, 20))
        return [_write(folder / f"{name}-{i}.tar", part, dtype, raw) for i, part in enumerate(parts)]

    return make


def _numbers(batches: DaliTars, count: int) -> list[int]:
    return [int(number) for batch in islice(batches, count) for number in batch.latents[:, 0, 0, 0]]


@pytest.mark.parametrize(("dtype", "raw"), [*((dtype, True) for dtype in RAW), *((dtype, False) for dtype in NPY)])
def test_latents_and_labels_of_tars_come_as_they_are(tars, dtype, raw):
    batches = DaliTars(tars(dtype, raw), 4, raw=RAW[dtype] if raw else None, shuffle=0)
    for first, batch in zip((0, 4, 8, 12, 16, 0), batches, strict=False):
        assert batch.latents.dtype == dtype and not batch.resident
        assert torch.equal(batch.latents, torch.stack([_latent(first + i, dtype) for i in range(4)]))
        assert batch.labels.tolist() == [(first + i) % 7 for i in range(4)] and batch.labels.dtype == torch.int64


def test_a_shuffled_epoch_has_every_sample_once_in_an_order_of_the_seed(tars):
    epochs = {seed: _numbers(DaliTars(tars(), 4, shuffle=8, seed=seed), 10) for seed in (3, 4)}
    for found in epochs.values():
        assert sorted(found[:20]) == sorted(found[20:]) == list(range(20)) != found[:20] != found[20:]
    assert epochs[3] != epochs[4]
    assert _numbers(DaliTars(tars(), 4, shuffle=8, seed=3), 10) == epochs[3]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_an_epoch(tars, size):
    each = [_numbers(DaliTars(tars(), 5, shuffle=8, rank=rank, size=size), 4 // size) for rank in range(size)]
    assert sorted(itertools.chain(*each)) == list(range(20))


@pytest.mark.parametrize("taken", [0, 3, 7])
def test_a_checkpoint_of_tars_goes_on_where_it_was(tars, taken):
    how = {"shuffle": 8, "seed": 1, "rank": 1, "size": 2}
    batches = DaliTars(tars(), 4, **how)
    _numbers(batches, taken)
    restored = DaliTars(tars(), 4, **how, checkpoint=batches.checkpoint())
    assert _numbers(restored, 9) == _numbers(batches, 9)


def test_indexes_say_where_samples_are(tars, tmp_path):
    """Of three samples alone, then: those that the index has."""
    with tarfile.open(tars()[0]) as tar:
        members = {member.name: member for member in tar}
    lines = []
    for number in (5, 2, 7):
        files = [(ext, members[f"{number:06d}.{ext}"]) for ext in ("cls", "npy")]
        lines.append(" ".join(f"{ext} {file.offset_data} {file.size} {file.name}" for ext, file in files))
    index = tmp_path / "0.idx"
    index.write_text(f"v1.2 {len(lines)}\n" + "\n".join(lines))
    assert _numbers(DaliTars(tars()[:1], 3, shuffle=0, indexes=[index]), 2) == [5, 2, 7] * 2


def _damaged(path: Path) -> Path:
    path.write_bytes(b"x" * 3000)
    return path


MORE = {
    "no cls": (lambda path: _write(path, range(9), torch.float32, False, cls=lambda n: None), "Underful sample"),
    "no latent": (lambda path: _write(path, range(9), torch.float32, False, npy=lambda n: None), "Underful sample"),
    "label": (
        lambda path: _write(path, range(9), torch.float32, False, cls=lambda n: b"cat"),
        r"given label b'cat', allowed a whole number in ASCII",
    ),
    "shapes": (
        lambda path: _write(path, range(9), torch.float32, False, npy=lambda n: np.zeros((2, 3 + n % 2, 4))),
        r"given latents of shapes \[\(2, 3, 4\), \(2, 4, 4\)\], allowed one shape",
    ),
    "no npy": (lambda path: _write(path, range(9), torch.float32, False, npy=lambda n: b"numbers"), "numpy"),
    "damaged": (_damaged, "Corrupted tar file"),
    "absent": (lambda path: path, "does not exist"),
}


@pytest.mark.parametrize("case", MORE)
def test_tars_that_are_not_right_are_named(tmp_path, case):
    make, message = MORE[case]
    path = make(tmp_path / "wrong.tar")
    with pytest.raises(DataError, match=rf"wrong\.tar.*{message}") as caught:
        _numbers(DaliTars([path], 2), 4)
    assert "\n" not in str(caught.value)


def test_raw_latents_of_another_size_are_refused(tars):
    with pytest.raises(DataError, match=r"\.tar and 1 more: .*[Vv]olume"):
        next(DaliTars(tars(torch.float16, True), 2, raw=RawLatents("latent", (2, 3, 5), torch.float16)))
    with pytest.raises(ConfigError, match=r"dtype: given torch.float64, allowed torch.float16"):
        RawLatents("latent", SHAPE, torch.float64)


def test_no_tars_are_refused():
    with pytest.raises(ConfigError, match="tars: given none, allowed 1 or more"):
        DaliTars([], 1)


def test_more_ranks_than_samples_are_refused(tmp_path):
    path = _write(tmp_path / "few.tar", range(3), torch.float32, False)
    with pytest.raises(DataError, match=r"few\.tar: .*3.*4"):
        DaliTars([path], 1, rank=3, size=4)
