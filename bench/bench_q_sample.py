"""q_sample under pytest-benchmark: python -m pytest bench/bench_q_sample.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_q_sample(timed, case, variant):
    timed(case, variant)
