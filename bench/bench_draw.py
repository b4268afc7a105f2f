"""draw under pytest-benchmark: python -m pytest bench/bench_draw.py"""

import pytest

from erd_fast.benchmark.timing import clock


@pytest.mark.benchmark(group="draw/fwd", timer=clock)
def test_draw(timed, variant, size):
    timed("draw", variant, size)
