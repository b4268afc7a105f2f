"""q_sample under pytest-benchmark: python -m pytest bench/bench_q_sample.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(group="q_sample/fwd", timer=clock)
def test_q_sample(timed, variant, size, mode):
    timed("q_sample", variant, size, mode)
