"""loaders: two readers, one sequence of batches."""

import threading
import time
from itertools import islice

import pytest
import torch

from erd_fast.data import LatentStore, loaders, open_reader, write_store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LatentStore:
    latents = torch.arange(40.0)[:, None, None, None].expand(40, 1, 2, 2)
    path = tmp_path_factory.mktemp("loaders") / "store"
    return write_store(path, [(latents, torch.arange(40) % 7)], kind="sample", num_classes=7, shard_size=15)


def _plan(number: int) -> torch.Tensor:
    return (torch.arange(4) * 11 + number) % 40


def _reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mmap-reader")]


@pytest.mark.parametrize("start", [0, 5])
def test_mmap_gives_the_planned_rows_in_order(store, start):
    batches = open_reader(store, "mmap", CPU).batches(_plan, start)
    for number, batch in enumerate(islice(batches, 6), start):
        assert not batch.resident
        assert torch.equal(batch.latents[:, 0, 0, 0], _plan(number).float())
        assert torch.equal(batch.labels, _plan(number) % 7)
    batches.close()


def test_resident_gives_the_whole_store_each_time(store):
    batches = open_reader(store, "resident", CPU).batches(_plan, 3)
    first, second = next(batches), next(batches)
    assert first is second and first.resident
    assert torch.equal(first.latents, store.gather(torch.arange(40))) and torch.equal(first.labels, store.labels)


def test_mmap_reads_ahead_by_a_bounded_number(store):
    asked: list[int] = []
    batches = open_reader(store, "mmap", CPU).batches(lambda number: asked.append(number) or _plan(number), 0)
    next(batches)
    until = time.monotonic() + 10
    while len(asked) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)  # time for one too many
    assert asked == [0, 1, 2]
    batches.close()


def test_closing_ends_the_reading_thread(store):
    batches = open_reader(store, "mmap", CPU).batches(_plan, 0)
    next(batches)
    assert _reading_threads()
    batches.close()
    assert not _reading_threads()


def test_an_error_in_the_reading_thread_reaches_the_consumer(store):
    def plan(number: int) -> torch.Tensor:
        if number == 2:
            raise ZeroDivisionError("batch 2")
        return _plan(number)

    batches = open_reader(store, "mmap", CPU).batches(plan, 0)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(ZeroDivisionError, match="batch 2"):
        next(batches)
    assert not _reading_threads()


def test_auto_is_resident_where_the_store_takes_half_of_the_free_memory_at_most(store, monkeypatch):
    size = 40 * 4 * 4
    for free, name in ((2 * size, "resident"), (2 * size - 1, "mmap")):
        monkeypatch.setattr(loaders, "_free_bytes", lambda device, free=free: free)
        assert open_reader(store, "auto", CPU).name == name
    assert open_reader(store, "resident", CPU).name == "resident"  # asked for by name, whatever the room


def test_free_memory_is_in_bytes():
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    assert total / 1000 < loaders._free_bytes(CPU) < total
