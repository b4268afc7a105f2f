"""A hundred random calls of each op, on the CPU backend and the reference; `make soak` runs thousands."""

import pytest

from support.random_calls import OPS, UNAVAILABLE, assert_right, run_calls

pytestmark = pytest.mark.slow


def test_random_calls_give_what_the_reference_gives():
    run = run_calls(list(OPS), 100)
    if run.returncode == UNAVAILABLE:
        pytest.skip(run.stdout.splitlines()[-1])
    assert_right(run)
