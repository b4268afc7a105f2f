"""loaders: three readers, one sequence of batches."""

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from itertools import chain, islice
from typing import get_args

import pytest
import torch

from erd_fast.data import Batch, LatentStore, Loader, loaders, open_reader, write_store
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.ops import record, use_backend
from erd_fast.random import sample_order
from erd_fast.training.build import build_step
from erd_fast.training.distributed import Ranks

CPU = torch.device("cpu")
COUNT, CLASSES = 40, 7
AHEAD = {"mmap": 2, "dali": 3}  # batches; DALI has one of its own
READERS = ("resident", "mmap", "dali")
reading = pytest.mark.parametrize("loader", AHEAD)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LatentStore:
    """Three shards, in which every number is that of its sample."""
    latents = torch.arange(float(COUNT))[:, None, None, None].expand(COUNT, 1, 8, 8)
    path = tmp_path_factory.mktemp("loaders") / "store"
    batches = [(latents, torch.arange(COUNT) % CLASSES)]
    return write_store(path, batches, kind="sample", num_classes=CLASSES, shard_size=15)


def _plan(number: int) -> torch.Tensor:
    return (torch.arange(4) * 11 + number) % COUNT


def _ids(batch: Batch) -> torch.Tensor:
    return batch.latents[:, 0, 0, 0].long()


def _reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "-reader" in thread.name]


def test_every_loader_has_a_reader_of_its_name(store):
    assert {open_reader(store, name, CPU).name for name in READERS} == {*get_args(Loader)} - {"auto"}


@reading
@pytest.mark.parametrize("start", [0, 5])
def test_the_planned_rows_come_in_order(store, loader, start):
    batches = open_reader(store, loader, CPU).batches(_plan, start)
    for number, batch in enumerate(islice(batches, 8), start):
        assert not batch.resident
        assert torch.equal(batch.latents, store.gather(_plan(number)))
        assert torch.equal(_ids(batch), _plan(number)) and torch.equal(batch.labels, _plan(number) % CLASSES)
    batches.close()


def test_resident_gives_the_whole_store_each_time(store):
    batches = open_reader(store, "resident", CPU).batches(_plan, 3)
    first, second = next(batches), next(batches)
    assert first is second and first.resident
    assert torch.equal(first.latents, store.gather(torch.arange(COUNT))) and torch.equal(first.labels, store.labels)


@reading
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
def test_rows_are_those_of_the_store_bit_for_bit(tmp_path, loader, dtype):
    numbers = torch.arange(20 * 3 * 4 * 5, dtype=torch.int32).view(20, 3, 4, 5)
    bits = torch.uint8 if dtype == torch.uint8 else torch.int32 if dtype == torch.float32 else torch.int16
    latents = (numbers * 2**12 if bits == torch.int32 else numbers).to(bits).view(dtype)  # subnormal numbers among them
    kind = "pixels" if dtype == torch.uint8 else "sample"
    made = write_store(tmp_path / "s", [(latents, torch.arange(20))], kind=kind, num_classes=20, shard_size=7)
    batches = open_reader(made, loader, CPU).batches(lambda number: torch.tensor([19, 0, 7, 6, 0]), 0)
    batch = next(batches)
    batches.close()
    assert batch.latents.dtype == dtype and batch.latents.shape == (5, 3, 4, 5)
    assert torch.equal(batch.latents.view(bits), latents[[19, 0, 7, 6, 0]].view(bits))
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [19, 0, 7, 6, 0]


@reading
def test_batches_that_are_kept_stay_as_they_are(store, loader):
    batches = open_reader(store, loader, CPU).batches(_plan, 0)
    kept = list(islice(batches, 12))
    batches.close()
    gc.collect()
    junk = [torch.full_like(kept[0].latents, 99.0) for _ in range(50)]
    assert all(torch.equal(_ids(batch), _plan(number)) for number, batch in enumerate(kept)), len(junk)


@reading
def test_a_bounded_number_of_batches_is_read_ahead(store, loader):
    asked: list[int] = []
    batches = open_reader(store, loader, CPU).batches(lambda number: asked.append(number) or _plan(number), 0)
    asked.clear()  # the size of a batch is asked for, too
    next(batches)
    expected = list(range(1 + AHEAD[loader]))
    until = time.monotonic() + 10
    while len(asked) < len(expected) and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)  # time for one too many
    batches.close()
    assert asked == expected


@reading
def test_rows_are_copied_in_another_thread(store, loader, monkeypatch):
    gather, threads = LatentStore.gather, set()
    monkeypatch.setattr(
        LatentStore, "gather", lambda self, *index: threads.add(threading.get_ident()) or gather(self, *index)
    )
    batches = open_reader(store, loader, CPU).batches(_plan, 0)
    next(batches)
    batches.close()
    assert len(threads) == 1 and threading.get_ident() not in threads


@reading
def test_a_reading_thread_uses_the_backends_and_the_recording_of_its_caller(store, loader):
    process = DiffusionProcess(get_schedule("cosine"), "v")

    def plan(number: int) -> torch.Tensor:
        counter = torch.tensor(4 * number)
        return process.draw(counter, global_batch=4, seed=1, batch_size=4, dataset_size=COUNT).sample_index

    reader = open_reader(store, loader, CPU)
    with (
        use_backend(draw="reference"),
        record() as recording,
        contextlib.closing(reader.batches(plan, 0)) as batches,
    ):
        ids = _ids(next(batches))
    assert recording.backends == {"draw": ["reference"]}
    assert torch.equal(ids, plan(0))


@reading
def test_closing_ends_the_threads(store, loader):
    before = set(os.listdir("/proc/self/task"))  # those of DALI have no name in Python
    with contextlib.closing(open_reader(store, loader, CPU).batches(_plan, 0)) as batches:
        next(batches)
        assert _reading_threads() and set(os.listdir("/proc/self/task")) - before
    until = time.monotonic() + 10
    while (left := set(os.listdir("/proc/self/task")) - before) and time.monotonic() < until:
        time.sleep(0.001)
    assert not _reading_threads() and not left


@reading
@pytest.mark.parametrize("bad", [0, 1, 2, 7])
def test_an_error_in_the_plan_reaches_the_consumer_after_the_batches_before_it(store, loader, bad):
    def plan(number: int) -> torch.Tensor:
        if number == 10 + bad and threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError(f"batch {bad}")
        return _plan(number)

    batches = open_reader(store, loader, CPU).batches(plan, 10)
    assert [_ids(batch).tolist() for batch in islice(batches, bad)] == [_plan(10 + n).tolist() for n in range(bad)]
    with pytest.raises(ZeroDivisionError, match=f"batch {bad}"):
        next(batches)
    assert not _reading_threads()


def _drawn(store: LatentStore, config, loader: str, size: int, images: int, batches: int) -> list[list[int]]:
    """Sample ids of ``batches`` batches of ``size`` ranks together, from ``images`` images on."""
    found: list[list[int]] = [[] for _ in range(batches)]
    for rank in range(size):
        step = build_step(config, store, CPU, Ranks(rank, size))
        start = images // config.train.batch_size * step.micro_batches
        read = open_reader(store, loader, CPU).batches(step.plan, start)
        for number in range(batches * step.micro_batches):
            batch = next(read)
            ids = step.plan(start + number) if batch.resident else _ids(batch)  # what a step picks
            found[number // step.micro_batches] += ids.tolist()
        read.close()
    return found


@pytest.mark.parametrize("loader", READERS)
@pytest.mark.parametrize(("size", "micro_batch"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_every_sample_comes_once_an_epoch_whatever_reads_and_on_any_number_of_ranks(
    store, tiny, loader, size, micro_batch
):
    config = tiny(train={"batch_size": 8, "micro_batch": micro_batch, "seed": 5})
    epochs = _drawn(store, config, loader, size, 0, 10)
    order = sample_order(5, torch.arange(2 * COUNT), COUNT)
    assert [sorted(batch) for batch in epochs] == [sorted(batch.tolist()) for batch in order.split(8)]
    for epoch in (epochs[:5], epochs[5:]):
        assert sorted(chain(*epoch)) == list(range(COUNT))
    assert epochs[:5] != epochs[5:]


@pytest.mark.parametrize("loader", READERS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_start_anywhere_costs_nothing(store, tiny, loader, size):
    first = 10**12
    began = time.perf_counter()
    (batch,) = _drawn(store, tiny(train={"batch_size": 8}), loader, size, first, 1)
    assert time.perf_counter() - began < 10
    assert sorted(batch) == sorted(sample_order(0, torch.arange(first, first + 8), COUNT).tolist())


def _anonymous_memory() -> int:
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@reading
def test_memory_stays_flat_over_epochs(tmp_path, loader):
    rows, size = 1024, 64
    latents = torch.ones(rows, 8, 32, 32).half()  # 16 MiB
    made = write_store(tmp_path / "s", [(latents, torch.zeros(rows).long())], kind="mean_std", num_classes=1)
    del latents
    batches = open_reader(made, loader, CPU).batches(lambda n: (torch.arange(size) + size * n) % rows, 0)

    def epochs(count: int) -> Iterator[int]:
        return (int(batch.labels.sum()) for batch in islice(batches, count * rows // size))

    sum(epochs(1))
    before = _anonymous_memory()
    sum(epochs(3))
    grown = _anonymous_memory() - before
    batches.close()
    assert grown < 16 << 20


@pytest.mark.parametrize("needed", [0, 1000])
def test_auto_is_resident_where_the_store_takes_half_of_the_memory_beside_a_step(store, monkeypatch, needed):
    size = COUNT * 64 * 4
    for room, name in ((2 * size, "resident"), (2 * size - 1, "mmap")):
        monkeypatch.setattr(loaders, "_free_bytes", lambda device, free=room + needed: free)
        assert open_reader(store, "auto", CPU, needed).name == name
    assert open_reader(store, "resident", CPU).name == "resident"  # asked for by name, whatever the room


def test_free_memory_is_in_bytes():
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    assert total / 1000 < loaders._free_bytes(CPU) < total
