"""grad_norm under pytest-benchmark: python -m pytest bench/bench_grad_norm.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_grad_norm(timed, case, variant):
    timed(case, variant)
