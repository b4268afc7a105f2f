"""draw under pytest-benchmark: python -m pytest bench/bench_draw.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_draw(timed, case, variant):
    timed(case, variant)
