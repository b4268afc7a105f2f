"""How long calls take: all variants of a case in turn, medians with their spread, on a CPU or a GPU.

Calls are given as copies on inputs of their own (:func:`copies_past_cache`), so that no input is still in a cache when
its turn comes again.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

_CACHE_BYTES = 128 << 20  # more than the second-level cache of any GPU
_MOST_COPIES = 512
_SAMPLE_SECONDS = 2e-3  # of wall time: the clock, and the end of a GPU's queue, are small beside it
_REPLAYS = 3
_MOST_RUNS = 1000


@dataclasses.dataclass(frozen=True)
class Sampler:
    """``take()`` times one sample and gives the seconds of one call; ``cost``: seconds that a sample takes, roughly."""

    take: Callable[[], float]
    cost: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    iqr_s: float
    runs: int


def interleaved(samplers: Sequence[Sampler], seconds: float = 0.3, least_runs: int = 3) -> list[Timing]:
    """Sample all variants of a case in rounds: what else the machine does, and its clocks, then fall on all alike.

    Each is warmed up for a third of ``seconds``, and gets as many samples as fit into ``seconds``, ``least_runs`` at
    least, spread evenly over the rounds. Every other round goes backwards, so that none always follows the same one.
    """
    runs = [_warm_up(sampler, seconds, least_runs) for sampler in samplers]
    samples: list[list[float]] = [[] for _ in samplers]
    rounds = max(runs)
    for number in range(rounds):
        due = [i for i, wanted in enumerate(runs) if (number + 1) * wanted // rounds > number * wanted // rounds]
        for i in reversed(due) if number % 2 else due:
            samples[i].append(samplers[i].take())
    return [timing_of(found) for found in samples]


def _warm_up(sampler: Sampler, seconds: float, least_runs: int) -> int:
    """How many samples fit into ``seconds``. What is slow was warm after its first call."""
    began, cost = time.perf_counter(), sampler.cost
    for taken in range(1, 1 + int(seconds / 3 / cost)):
        sampler.take()
        cost = (time.perf_counter() - began) / taken
    return min(max(round(seconds / cost), least_runs), _MOST_RUNS)


def timing_of(samples: Sequence[float]) -> Timing:
    """Of two samples or more."""
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, high - low, len(samples))


def wall(calls: Sequence[Call], seconds: float = _SAMPLE_SECONDS) -> Sampler:
    """What a loop in Python sees: calls in a row for about ``seconds``, or one that takes longer; a GPU's queue is
    empty at the start and at the end."""
    turn = itertools.cycle(calls)

    def sample(count: int) -> float:
        began = clock()
        for _ in range(count):
            next(turn)()
        return (clock() - began) / count

    once, count = sample(1), 1
    if seconds > once:  # of a few microseconds, most is the clock
        once = sample(round(seconds / once))
        count = max(1, round(seconds / once))
    return Sampler(lambda: sample(count), count * once)


def captured(calls: Sequence[Call]) -> Sampler:
    """Time on the GPU, launches left out: all calls are captured in one CUDA graph, their outputs kept apart, and
    replays are timed between two events, with one more queued before them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # what a first call compiles, allocates and keeps is no part of the graph
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    del kept  # freed within the capture, an output would have taken the place of the one before
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        graph.replay()
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / (_REPLAYS * len(calls))

    return Sampler(sample, sample() * (_REPLAYS + 1) * len(calls))


def copies_past_cache(bytes_moved: int) -> int:
    """How many copies of a call's inputs and outputs exceed the caches; 2 at least, 512 at most."""
    return max(2, min(_MOST_COPIES, -(-_CACHE_BYTES // bytes_moved)))


def clock() -> float:
    """The time when a GPU, if there is one, has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
