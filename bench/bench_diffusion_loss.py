"""diffusion_loss under pytest-benchmark: python -m pytest bench/bench_diffusion_loss.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_diffusion_loss(timed, case, variant):
    timed(case, variant)
