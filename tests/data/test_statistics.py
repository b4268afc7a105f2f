"""statistics: what is measured of rows is what PyTorch says of all of them, however they are cut."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.data import LatentStore, write_store
from erd_fast.data.statistics import digests, measure, measure_some, total

SCALE, SHIFT = (0.5, 2.0), (1.0, -3.0)


def _make(path, kind: str, latents: torch.Tensor, **how) -> LatentStore:
    labels = torch.zeros(len(latents), dtype=torch.int64)
    return write_store(path, [(latents, labels)], kind=kind, num_classes=0, shard_size=17, **how)


def _moments(kind: str, count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(count, 2, 5, 6, generator=generator) * 3 + torch.tensor([2.0, -1.0])[:, None, None]
    std = torch.rand(count, 2, 5, 6, generator=generator) * 2
    second = {"sample": [], "mean_std": [std], "mean_logvar": [2 * std.log()]}[kind]
    return torch.cat([mean, *second], dim=1)


@pytest.mark.parametrize("kind", ["sample", "mean_std", "mean_logvar"])
def test_mean_and_std_are_those_of_draws_from_the_posterior(tmp_path, kind):
    stored = _moments(kind)
    store = _make(tmp_path / "store", kind, stored, scale=SCALE, shift=SHIFT)
    found = total(measure(shard, 0, store.manifest) for shard in store.shards())
    shift, scale = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (SHIFT, SCALE))
    values = (stored[:, :2].double() - shift) * scale
    variance = values.var((0, 2, 3), correction=0)
    if kind != "sample":
        second = stored[:, 2:].double()
        std = second if kind == "mean_std" else (second / 2).exp()
        variance += (std * scale).square().mean((0, 2, 3))
    # A value is rounded to float32 three times, numbers of up to 5 std each; half of a square's error is the std's.
    rounding = 3 * 5 * 2**-24
    assert ((found.mean - values.mean((0, 2, 3))).abs() <= rounding * variance.sqrt()).all()
    # A std comes by way of log10, of up to 4 in size here: 2 ln 10 of its roundings are in the square.
    rounding += 2 * np.log(10) * 4 * 2**-24
    torch.testing.assert_close(found.std, variance.sqrt(), rtol=rounding, atol=0)
    assert found.overall_std == pytest.approx(float(variance.mean().sqrt()), rel=rounding)
    assert torch.equal(found.lowest, stored.amin((0, 2, 3))) and torch.equal(found.highest, stored.amax((0, 2, 3)))
    assert found.values.sum(1).tolist() == [40 * 5 * 6] * 2
    assert found.spreads.sum() == (0 if kind == "sample" else 2 * 40 * 5 * 6)


def test_pixels_are_from_minus_one_to_one(tmp_path):
    pixels = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).view(1, 1, 2, 2)
    store = _make(tmp_path / "store", "pixels", pixels)
    found = measure(pixels, 0, store.manifest)
    assert found.mean.item() == pytest.approx(0, abs=2**-23)  # x / 127.5 and - 1, each rounded
    assert found.std.item() == pytest.approx((2 * 1 + 2 * 0.6**2) ** 0.5 / 2, rel=2**-22)


def test_histograms_count_where_values_lie(tmp_path):
    values = torch.tensor([-7.0, -4.96, 0.06, 4.95, 9.0, 0.0]).view(1, 1, 2, 3)
    store = _make(tmp_path / "store", "sample", values)
    counts = measure(values, 0, store.manifest).values[0]
    assert {int(place): int(counts[place]) for place in counts.nonzero()} == {0: 2, 50: 2, 99: 2}
    moments = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3)
    for kind, second in (("mean_std", 0.01), ("mean_logvar", 2 * np.log(0.01))):
        store = _make(tmp_path / kind, kind, moments * second + 1e-4 * (kind == "mean_std"))
        counts = measure(next(store.shards()), 0, store.manifest).spreads[0]
        assert counts.nonzero().tolist() == [[60]], kind  # log10 std is -2 and a little


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_pieces_add_up(tmp_path_factory, cuts):
    stored = _moments("mean_std")
    stored[[5, 31], 1, 2, 3] = torch.nan
    stored[7] = 2.0
    store = _make(tmp_path_factory.mktemp("cuts") / "store", "mean_std", _moments("mean_std"), scale=SCALE)
    edges = [0, *sorted(cuts), 40]
    parts = (measure(stored[a:b], a, store.manifest) for a, b in itertools.pairwise(edges))
    whole, summed = measure(stored, 0, store.manifest), total(parts)
    assert (summed.rows, summed.not_finite, summed.constant) == (40, (5, 31), (7,))
    assert torch.equal(summed.values, whole.values) and torch.equal(summed.spreads, whole.spreads)
    # Sums are float64; a power of ten may round otherwise where a piece ends, beyond the last full vector.
    torch.testing.assert_close(summed.std, whole.std, rtol=2**-23, atol=0)


def test_some_rows_are_spread_over_the_store_and_a_small_one_is_read_whole(tmp_path):
    latents = torch.arange(100.0)[:, None, None, None].expand(100, 1, 2, 2)
    store = _make(tmp_path / "store", "sample", latents)
    some = measure_some(store, runs=3, length=4)
    assert some.rows == 12 and (some.lowest.item(), some.highest.item()) == (0, 99)
    assert some.mean.item() == pytest.approx(((0 + 3) + (48 + 51) + (96 + 99)) / 6)
    assert len(set(some.constant)) == 12
    small = measure_some(store, runs=200, length=16)
    assert set(small.constant) == set(range(100))


def test_rows_have_equal_hashes_when_they_are_equal():
    rows = torch.randn(6, 2, 3, 4)
    rows[4] = rows[1]
    found = digests(rows)
    assert len(found) == 6 and len(np.unique(found)) == 5 and found[4] == found[1]
    assert len(np.unique(digests(rows.half()[:, :, :1]))) == 5
