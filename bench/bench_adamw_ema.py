"""adamw_ema under pytest-benchmark: python -m pytest bench/bench_adamw_ema.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_adamw_ema(timed, case, variant):
    timed(case, variant)
