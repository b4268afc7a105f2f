"""How long a call takes: medians with their spread, on a CPU or a GPU."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_L2_BYTES = 128 << 20  # more than any second-level cache there is: inputs are rotated past it


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    iqr_s: float
    runs: int


def measure(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, seconds: float = 0.3, least_runs: int = 10
) -> Timing:
    """Time a call, given as copies of it on rotated inputs (:func:`copies_past_l2`), so that caches do not help.

    On a GPU each sample is the device time of 20 calls in a row between two events, with more queued ahead, so that
    the launch is not what is timed; on a CPU it is the wall time of one call. Warms up for a third of ``seconds``.
    """
    turn = _rotation(calls)
    sample = _gpu_sample if device.type == "cuda" else _cpu_sample
    warm = time.perf_counter() + seconds / 3
    sample(turn)
    while time.perf_counter() < warm:
        sample(turn)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least_runs or time.perf_counter() < end:
        samples.append(sample(turn))
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, high - low, len(samples))


def copies_past_l2(bytes_moved: int, device: torch.device) -> int:
    """How many copies of the inputs it takes to leave the caches; 1 on a CPU for small ones."""
    if device.type != "cuda":
        return 2
    return max(2, min(64, -(-_L2_BYTES // max(bytes_moved, 1))))


def _rotation(calls: Sequence[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    while True:
        yield from calls


def _cpu_sample(turn: Iterator[Callable[[], Any]]) -> float:
    call = next(turn)
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _gpu_sample(turn: Iterator[Callable[[], Any]], calls: int = 20) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        next(turn)()
    begin.record()
    for _ in range(calls):
        next(turn)()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls
