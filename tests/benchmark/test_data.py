"""bench data: what is given is checked, what is measured is what it is called, and what is written."""

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from erd_fast import cli
from erd_fast.benchmark import data, data_sources, data_steps, data_variants
from erd_fast.benchmark.data import bench_data, data_cases
from erd_fast.benchmark.data_report import picture, speedups, table
from erd_fast.benchmark.data_variants import BASELINES, OURS, Variant
from erd_fast.benchmark.records import Record
from erd_fast.data import Batch, LatentStore
from erd_fast.errors import ConfigError, RunError
from erd_fast.training.config import ModelConfig

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ALL = [*OURS, *BASELINES]
TINY = ModelConfig("DiT-tiny/8", hidden_size=32, depth=1, num_heads=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"_COUNT": 48, "_COUNTS": (24, 16), "_BATCH": 8, "_SAMPLE_SECONDS": 0.01}.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(Variant, "settle", lambda self: None)
    monkeypatch.setattr(data_sources, "_SHARD", 20)
    monkeypatch.setattr(data_sources, "WORKERS", 1)
    monkeypatch.setattr(data, "PACES", {"DiT-S/2": 4000, "DiT-XL/2": 800})


def test_every_variant_is_measured_in_every_case():
    records = list(bench_data(seconds=0.03))
    cases = {(case.group, case.name): case for case in data_cases(CPU)}
    assert [(r.group, r.case, r.variant) for r in records] == [(*case, name) for case in cases for name in ALL]
    for record in records:
        assert record.median_s > 0 and record.iqr_s >= 0 and record.runs >= 3
        numbers = {name for name, value in dataclasses.asdict(record).items() if value is not None}
        numbers -= {"group", "case", "variant", "backend", "median_s", "iqr_s", "runs", "processes"}
        assert (
            numbers
            == {
                "data/read": {"latents_per_sec", "cpu_ms_per_1k"},
                "data/pace": {"wait_pct"},
                "data/memory": {"growth_bytes"},
            }[record.group]
        )
        if record.group == "data/read":
            assert record.latents_per_sec == pytest.approx(8 / record.median_s)
            assert record.processes == (1 if record.variant in BASELINES else None)
    assert not multiprocessing.active_children()


def test_a_filter_takes_some_and_must_take_one(monkeypatch):
    monkeypatch.setattr(data_variants, "OURS", ("mmap",))
    assert [(r.group, r.variant) for r in bench_data("data/mem")] == [("data/memory", n) for n in ("mmap", *BASELINES)]
    with pytest.raises(ConfigError, match=r"filter: given 'pace/', allowed part of a case's name: data/read"):
        list(bench_data("pace/"))


def test_what_is_not_installed_is_named_and_left_out(monkeypatch, capsys, tmp_path):
    for module in ("h5py", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, module, None)
    names = [record.variant for record in bench_data("data/memory", seconds=0.03)]
    assert names == ["mmap", "resident", "dataloader-npy"]
    said = capsys.readouterr().err
    assert "hdf5 does not run here and is left out" in said and "erd-fast[formats]" in said
    assert "dali does not run here and is left out" in said and "erd-fast[dali]" in said
    store = data_sources.write_latents(tmp_path / "store", 16)
    assert not list(data_steps.bench_steps(TINY, "", 4, store, ("dali",), CPU))
    assert "erd-fast[dali]" in capsys.readouterr().err


def test_a_reader_that_gives_others_ends_the_run(monkeypatch):
    opened = data_variants.open_reader

    class Shifted:
        def __init__(self, *arguments):
            self.reader = opened(*arguments)

        def batches(self, plan, start):
            return self.reader.batches(plan, start + 1)

    monkeypatch.setattr(data_variants, "open_reader", Shifted)
    with pytest.raises(RunError, match="data, mmap: batch 0 has other latents than those asked for"):
        list(bench_data("data/memory"))


@pytest.mark.parametrize("what", ["latents", "labels"])
def test_a_baseline_that_gives_others_ends_the_run(monkeypatch, what):
    given = data_sources.NpyFiles.__getitem__

    def wrong(self, number):
        latents, labels = given(self, number)
        return (given(self, 3)[0], labels) if what == "latents" else (latents, labels + (number == 5))

    monkeypatch.setattr(data_sources.NpyFiles, "__getitem__", wrong)
    with pytest.raises(RunError, match="data, dataloader-npy: an epoch has other latents than the store"):
        list(bench_data("data/memory"))


def _batch(resident: bool = False) -> Batch:
    return Batch(torch.arange(6.0)[:, None], torch.arange(6), resident)


def test_of_a_resident_store_the_planned_rows_are_copied():
    variant = Variant("resident", iter([_batch(True)] * 2), 2, plan=lambda number: torch.tensor([5, number]))
    for number in range(2):
        latents, labels = variant.rows()
        assert latents[:, 0].tolist() == labels.tolist() == [5, number]


def _slow(seconds: float) -> Iterator[Batch]:
    while True:
        time.sleep(seconds)
        yield _batch()


@pytest.mark.parametrize(("seconds", "period"), [(0.015, 0.005), (0.0, 0.01)])
def test_the_part_of_a_step_that_waits(seconds, period):
    case = data.DataCase("data/pace", "DiT-S/2")
    (record,) = data._waits(period, [Variant("slow", _slow(seconds), 1)], case, 0.03)
    assert record.wait_pct == pytest.approx(100 * record.median_s / (record.median_s + period))
    assert seconds <= record.median_s < seconds + 0.05  # a busy machine sleeps longer


def test_what_was_ready_is_not_counted():
    """Four batches at once, then one each 20 ms."""

    def batches() -> Iterator[Batch]:
        yield from [_batch()] * 4
        yield from _slow(0.02)

    spent: list[float] = []
    assert 0.02 <= data._one_by_one(Variant("slow", batches(), 1), spent) < 0.1
    assert len(spent) == 1 and 0 <= spent[0] < 0.02


def test_memory_that_is_kept_is_seen():
    kept = []

    def batches() -> Iterator[Batch]:
        while True:
            kept.append(torch.ones(16 << 20))  # more than the allocator has at hand
            yield _batch()

    (record,) = data._growth([Variant("leaks", batches(), 1)], data.DataCase("data/memory", "3 epochs"), 0.0)
    # What tests before this one have left may be given back meanwhile.
    assert len(kept) == 3 and record.growth_bytes == pytest.approx(3 * (64 << 20), abs=48 << 20)


def _spin(stop) -> None:
    kept = torch.ones(8 << 20)
    while not stop.is_set():
        kept += 1


def test_processes_of_a_variant_count():
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    child = context.Process(target=_spin, args=(stop,))
    child.start()
    variant = Variant("with", iter([]), 1, processes=(child.pid,))
    alone = Variant("alone", iter([]), 1)
    try:
        until = time.monotonic() + 10
        while variant.cpu_seconds() - alone.cpu_seconds() < 0.2 and time.monotonic() < until:
            time.sleep(0.01)
        assert variant.cpu_seconds() - alone.cpu_seconds() >= 0.2
        assert variant.anonymous_bytes() - alone.anonymous_bytes() > 32 << 20
    finally:
        stop.set()
        child.join()


def test_steps_wait_for_a_slow_reader_and_not_for_what_is_resident(tmp_path, monkeypatch):
    for name, value in {"_WARM_UP": 4, "_INTERVALS": 2}.items():
        monkeypatch.setattr(data_steps, name, value)
    store, gather = data_sources.write_latents(tmp_path / "store", 16), LatentStore.gather
    monkeypatch.setattr(LatentStore, "gather", lambda self, index: time.sleep(0.08) or gather(self, index))
    records = {r.variant: r for r in data_steps.bench_steps(TINY, "DiT-tiny/8 N=4", 4, store, OURS, CPU, steps=2)}
    assert list(records) == [*OURS]
    for name, record in records.items():
        assert (record.group, record.case, record.runs) == ("data/step", "DiT-tiny/8 N=4", 2) and record.backend
        assert record.images_per_sec == pytest.approx(4 / record.median_s)
        assert record.wait_pct < 5 if name == "resident" else record.wait_pct > 20


def test_on_a_gpu_steps_are_measured_too():
    groups = [(case.group, case.name) for case in data_cases(torch.device("cuda"))]
    assert groups[-2:] == [("data/step", "DiT-S/2 N=8"), ("data/step", "DiT-B/2 N=8")]
    assert len(groups) == len(data_cases(CPU)) + 2


def _record(group: str, case: str, variant: str, **numbers: float) -> Record:
    return Record(group, case, variant, "", 0.002, 0.0005, 3, **numbers)


RECORDS = [
    _record("data/read", "N=256", "mmap", latents_per_sec=128_000.0, cpu_ms_per_1k=4.0),
    _record("data/read", "N=256", "hdf5", latents_per_sec=2000.0, cpu_ms_per_1k=800.0, processes=2),
    _record("data/pace", "DiT-S/2", "mmap", wait_pct=0.25),
    _record("data/memory", "3 epochs", "mmap", growth_bytes=3 << 20),
    _record("data/step", "DiT-S/2 N=256", "mmap", wait_pct=0.5, images_per_sec=8000.0),
]


def test_the_table_has_every_number_and_the_ratios():
    lines = table(RECORDS).splitlines()
    head = "group case variant latents/s CPU ms/1000 processes images/s wait growth MiB median ms iqr ms runs"
    assert lines[0].split() == head.split()
    assert lines[1].split() == ["data/read", "N=256", "mmap", "128,000", "4.0", "2.000", "0.500", "3"]
    assert lines[2].split() == ["data/read", "N=256", "hdf5", "2,000", "800.0", "2", "2.000", "0.500", "3"]
    assert lines[3].split() == ["data/pace", "DiT-S/2", "mmap", "0.25%", "2.000", "0.500", "3"]
    assert lines[4].split() == ["data/memory", "3", "epochs", "mmap", "3.0", "2.000", "0.500", "3"]
    assert lines[5].split() == ["data/step", "DiT-S/2", "N=256", "mmap", "8,000.0", "0.50%", "2.000", "0.500", "3"]
    assert lines[6:] == ["", "mmap / hdf5: 64.0"]
    assert speedups(RECORDS) == [("mmap", "hdf5", 64.0)]
    assert "/ " not in table(RECORDS[2:]).splitlines()[-1]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[2:3], RECORDS[3:4], []])
def test_a_picture_is_drawn_of_what_there_is(records):
    assert picture(records).startswith(b"\x89PNG")


def test_the_command_writes_results_and_a_picture(tmp_path, capsys):
    file = tmp_path / "out" / "data.json"
    cli.main(["bench", "data", "--filter", "data/read", "--seconds", "0.03", "--json", str(file)])
    out = capsys.readouterr().out
    assert f"wrote {file}" in out and f"wrote {file.with_suffix('.png')}" in out
    content = json.loads(file.read_text())
    assert [record["variant"] for record in content["records"]] == ALL
    assert all("latents_per_sec" in record for record in content["records"]) and "torch" in content["machine"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path(tmp_path).glob("**/erd-fast-bench-*"))
