"""`erd-fast bench data`: how fast latents are read, by the readers of a run and as other projects read them.

All is in the page cache: what is measured is the way from there, not a disk.
"""

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from erd_fast.benchmark.data_sources import write_latents
from erd_fast.benchmark.data_steps import bench_steps
from erd_fast.benchmark.data_variants import OURS, Variant, at_work
from erd_fast.benchmark.ops import matching, say
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.timing import Sampler, clock, interleaved, timing_of
from erd_fast.data import LatentStore
from erd_fast.training.config import ModelConfig

SECONDS = 4.0
PACES = {"DiT-S/2": 8500, "DiT-XL/2": 730}
"""Images a second that a large GPU is assumed to train, see docs/benchmarks.md."""
_BATCH = 256
_COUNT = 16_384  # latents: 256 MiB
_COUNTS = (8192, 2048)  # of them as NumPy files, and in HDF5: epochs of all would take too long
_SAMPLE_SECONDS = 0.8
_LEAST_BATCHES = 3
_WARM_UP_STEPS = 2
_LEAST_RUNS = 3
_EPOCHS = 3

Measure = Callable[[Sequence[Variant], "DataCase", float], Iterator[Record]]


@dataclasses.dataclass(frozen=True)
class DataCase:
    """What is measured of all variants; ``model``: of training steps instead."""

    group: str
    name: str
    measure: Measure | None = None
    model: ModelConfig | None = None
    usual: bool = True


def data_cases(device: torch.device) -> list[DataCase]:
    """Every case that is measured on ``device``."""
    found = [
        DataCase("data/read", f"N={_BATCH}", _rates),
        *(DataCase("data/pace", name, functools.partial(_waits, _BATCH / pace)) for name, pace in PACES.items()),
        DataCase("data/memory", f"{_EPOCHS} epochs", _growth),
    ]
    if device.type == "cuda":
        models = ("DiT-S/2", "DiT-B/2")
        found += [DataCase("data/step", f"{name} N={_BATCH}", model=ModelConfig(name)) for name in models]
    return found


def bench_data(pattern: str = "", seconds: float = SECONDS) -> Iterator[Record]:
    """Records of the cases whose ``group case`` contains ``pattern``, as they are measured, about ``seconds`` for each
    variant. What is being measured is said on stderr.

    Raises:
        ConfigError: no case contains the pattern. RunError: a variant gives other latents than the store has.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = matching(pattern, data_cases(device))
    with tempfile.TemporaryDirectory(prefix="erd-fast-bench-") as folder:
        say(f"writing {_COUNT:,} latents into {folder}")
        store = write_latents(Path(folder) / "store", _COUNT)
        yield from _of_variants([case for case in chosen if case.measure is not None], store, seconds, device)
        for case in chosen:
            if case.model is not None:
                say(f"{case.group} {case.name}")
                yield from bench_steps(case.model, case.name, _BATCH, store, OURS, device)


def _of_variants(
    cases: Sequence[DataCase], store: LatentStore, seconds: float, device: torch.device
) -> Iterator[Record]:
    if not cases:
        return
    say("checking")
    with at_work(store, _BATCH, _COUNTS, device) as variants:
        for case in cases:
            say(f"{case.group} {case.name}")
            assert case.measure is not None
            yield from case.measure(variants, case, seconds)


def _rates(variants: Sequence[Variant], case: DataCase, seconds: float) -> Iterator[Record]:
    """Latents a second of somebody who does nothing else, and what they cost."""
    spent: dict[str, list[float]] = {variant.name: [] for variant in variants}
    samplers = [Sampler(functools.partial(_one_by_one, v, spent[v.name]), _SAMPLE_SECONDS) for v in variants]
    for variant, timing in zip(variants, interleaved(samplers, seconds, _LEAST_RUNS), strict=True):
        yield Record(
            case.group,
            case.name,
            variant.name,
            "",
            **dataclasses.asdict(timing),
            latents_per_sec=_BATCH / timing.median_s,
            cpu_ms_per_1k=1e6 * statistics.median(spent[variant.name]) / _BATCH,
            processes=len(variant.processes) or None,
        )


def _one_by_one(variant: Variant, spent: list[float]) -> float:
    """Seconds of a batch; those of CPU go to ``spent``."""
    for _ in range(variant.ahead):  # what was ready before
        variant.rows()
    before, began, count = variant.cpu_seconds(), clock(), 0
    while count < _LEAST_BATCHES or time.perf_counter() - began < _SAMPLE_SECONDS:
        variant.rows()
        count += 1
    elapsed = clock() - began
    spent.append((variant.cpu_seconds() - before) / count)
    variant.settle()
    return elapsed / count


def _waits(period: float, variants: Sequence[Variant], case: DataCase, seconds: float) -> Iterator[Record]:
    """How long a step waits for its batch that takes ``period`` seconds once it has it, and leaves the CPU alone."""
    samplers = [Sampler(functools.partial(_paced, variant, period), cost=seconds) for variant in variants]
    for variant, timing in zip(variants, interleaved(samplers, seconds, _LEAST_RUNS), strict=True):
        wait_pct = 100 * timing.median_s / (timing.median_s + period)
        yield Record(case.group, case.name, variant.name, "", **dataclasses.asdict(timing), wait_pct=wait_pct)


def _paced(variant: Variant, period: float) -> float:
    """Mean seconds of waiting for a batch."""

    def step() -> float:
        asked = time.perf_counter()
        variant.take()
        waited = time.perf_counter() - asked
        time.sleep(period)
        return waited

    for _ in range(variant.ahead):
        variant.take()
    for _ in range(_WARM_UP_STEPS):  # until it is as far ahead as this pace lets it be
        step()
    waits, until = [step()], time.perf_counter() + _SAMPLE_SECONDS
    while len(waits) < _LEAST_BATCHES or time.perf_counter() < until:
        waits.append(step())
    variant.settle()
    return statistics.mean(waits)


def _growth(variants: Sequence[Variant], case: DataCase, seconds: float) -> Iterator[Record]:
    """Memory that is not given back over some epochs, after the one that was checked."""
    for variant in variants:
        before, epochs = variant.anonymous_bytes(), []
        for _ in range(_EPOCHS):
            began = clock()
            for _ in range(variant.epoch):
                variant.rows()
            epochs.append(clock() - began)
        growth, timing = variant.anonymous_bytes() - before, timing_of(epochs)
        yield Record(case.group, case.name, variant.name, "", **dataclasses.asdict(timing), growth_bytes=growth)
