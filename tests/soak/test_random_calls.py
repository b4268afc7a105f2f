"""Thousands of random calls of each op, compared between the CPU backend and the reference: `make soak`, eight minutes
on two cores."""

import pytest

from support.random_calls import OPS, UNAVAILABLE, assert_right, run_calls

CALLS = 5000


@pytest.mark.soak
@pytest.mark.parametrize("op", OPS)
def test_thousands_of_random_calls_give_what_the_reference_gives(op):
    run = run_calls([op], CALLS)
    if run.returncode == UNAVAILABLE:
        pytest.skip(run.stdout.splitlines()[-1])
    assert_right(run)
    print(run.stdout.splitlines()[-1])
