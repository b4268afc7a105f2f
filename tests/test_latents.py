"""latents: kinds, their channels, and the numbers that kernels keep for themselves."""

import pytest

from erd_fast.latents import (
    FLOAT_KINDS,
    KINDS,
    LOGVAR_RANGE,
    POSTERIOR_KINDS,
    has_posterior,
    latent_channels,
    stored_channels,
)


@pytest.mark.parametrize(("kind", "stored"), [("sample", 4), ("mean_std", 8), ("mean_logvar", 8), ("pixels", 4)])
def test_a_posterior_takes_twice_the_channels(kind, stored):
    assert has_posterior(kind) == (stored == 8)
    assert stored_channels(kind, 4) == stored and latent_channels(kind, stored) == 4


def test_kinds():
    assert KINDS == ("sample", "mean_std", "mean_logvar", "pixels")
    assert (*FLOAT_KINDS, "pixels") == KINDS and set(POSTERIOR_KINDS) == {kind for kind in KINDS if has_posterior(kind)}


def test_triton_has_the_same_kinds_and_clamp():
    pytest.importorskip("triton")
    from erd_fast.kernels import q_sample

    assert [getattr(q_sample, kind.upper()).value for kind in KINDS] == list(range(len(KINDS)))
    assert (q_sample._LOGVAR_LOW.value, q_sample._LOGVAR_HIGH.value) == LOGVAR_RANGE
