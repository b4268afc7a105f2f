"""timing: variants take turns, slow ones take fewer, and inputs outgrow the caches."""

import time

import pytest
import torch

from erd_fast.benchmark.timing import Sampler, copies_past_cache, interleaved, wall


def test_variants_take_turns_and_slow_ones_are_spread_over_the_rounds():
    taken: list[str] = []

    def sampler(name: str, cost: float, *values: float) -> Sampler:
        left = list(values)
        return Sampler(lambda: (taken.append(name), left.pop(0) if left else 1.0)[1], cost)

    fast, slow = interleaved([sampler("a", 0.03), sampler("b", 99.0, 4.0, 2.0, 3.0)], seconds=0.09, least_runs=3)
    assert taken[0] == "a"  # 0.03 of warm-up for what costs 0.03, none for what costs more
    del taken[0]
    assert (fast.median_s, fast.iqr_s) == (1.0, 0.0) and fast.runs == taken.count("a") > 3
    assert (slow.median_s, slow.iqr_s, slow.runs) == (3.0, 2.0, 3)
    places = [place for place, name in enumerate(taken) if name == "b"]
    third = len(taken) / 3
    assert [int(place / third) for place in places] == [0, 1, 2]


def test_every_other_round_goes_backwards():
    taken: list[int] = []
    samplers = [Sampler(lambda number=number: float(taken.append(number) or 1), 9.0) for number in range(3)]
    interleaved(samplers, seconds=0.01, least_runs=4)
    assert taken == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0]


def test_wall_time_is_that_of_one_call_and_takes_every_copy_in_turn():
    seen: list[int] = []

    def call(copy: int) -> None:
        seen.append(copy)
        time.sleep(0.001)

    sampler = wall([lambda: call(0), lambda: call(1), lambda: call(2)])
    before = len(seen)
    seconds = sampler.take()
    calls = len(seen) - before
    assert seen == [place % 3 for place in range(len(seen))]
    # A loaded machine sleeps longer, then fewer calls make a sample of two milliseconds; each sleeps one at least.
    assert 1 <= calls <= 2 and seconds >= 0.001 and sampler.cost >= 0.001


@pytest.mark.parametrize(("bytes_moved", "copies"), [(1, 512), (1 << 20, 128), (100 << 20, 2), (1 << 40, 2)])
def test_copies_of_the_inputs_outgrow_the_caches(bytes_moved, copies):
    assert copies_past_cache(bytes_moved) == copies


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch")
def test_captured_calls_take_the_time_of_their_kernels():
    from erd_fast.benchmark.timing import captured

    calls = [lambda: torch.cuda._sleep(1_000_000)] * 4
    one, two = captured(calls).take(), captured([lambda: [torch.cuda._sleep(1_000_000) for _ in range(2)]] * 4).take()
    assert 1.5 * one < two < 2.5 * one
