"""linear_gelu under pytest-benchmark: python -m pytest bench/bench_linear_gelu.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_linear_gelu(timed, case, variant):
    timed(case, variant)
