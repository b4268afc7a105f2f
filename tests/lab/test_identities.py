"""Identities of weightings: each holds where it is said to, and would be seen to fail elsewhere."""

import pytest

from erd_fast.diffusion import get_schedule, weight_table
from erd_fast.lab import identities
from erd_fast.lab.identities import measure_identities

# Products and quotients of ten to a hundred factors; where lambda is differenced on a grid, its rounding of 2**-53
# times |lambda| <= 23 over steps of 20 / 1000: 2e-13.
ROUNDING = 1e-12


def test_every_identity_holds():
    for identity in measure_identities():
        assert identity.difference <= ROUNDING, identity.statement
        assert identity.schedules and identity.consequence


def test_the_identities_of_erd_are_there():
    text = " ".join(identity.statement for identity in measure_identities())
    assert "ERD on eps is P2 with k = 1, gamma = 1/2" in text and "ERD on u is the constant weight" in text


@pytest.mark.parametrize("wrong", ["flow", "logsnr_flow"])
def test_a_false_one_would_be_seen(wrong):
    """P2 is ERD where the variance is preserved, and nowhere else."""
    found = identities._identity(
        "", "", (wrong,), lambda s: (weight_table("erd", "eps", s), weight_table("p2", "eps", s, gamma=0.5))
    )
    assert found.difference > 0.01


def test_the_largest_difference_of_all_schedules_counts():
    tables = {"gvp": 1.0, "flow": 1.5, "vp": 1.25}
    found = identities._identity(
        "", "", tuple(tables), lambda s: (weight_table("constant", "u", s) * tables[s.name], 1.0)
    )
    assert found.difference == 0.5
    assert get_schedule("gvp").variance_preserving
