"""draw: the integer decisions of a batch."""

import math

import pytest
import torch

from erd_fast.ops import Draw, draw
from erd_fast.random import Purpose, Stream, sample_order, stratified_word, stratum, words

scipy = pytest.importorskip("scipy")
HOW = {"seed": 0xFEDCBA9876543210, "dataset_size": 37, "num_timesteps": 1000, "label_drop": 0.1}
RARE = 1e-6  # chance that a right generator exceeds a bound below


def _draw(counter: int, batch_size: int, **how) -> Draw:
    return draw(torch.tensor(counter), batch_size=batch_size, **{**HOW, **how})


def _many(count: int, **how) -> Draw:
    """Statistics need many images; 64^2 samples fill the order's network, so none of them walks."""
    return _draw(0, count, dataset_size=4096, **how)


def _same(one: Draw, other: Draw) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("counter", [0, 1000, (1 << 32) - 20, 1 << 61])
def test_decisions_are_the_documented_bits_of_the_words(counter):
    found = _draw(counter, 40, offset=3)
    ids = counter + 3 + torch.arange(40)
    block = words(HOW["seed"], Purpose.TRAIN, Stream.SCALARS, ids, torch.tensor([0]))[:, 0].tolist()
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.sample_index, sample_order(HOW["seed"], ids, 37))
    assert found.t_index.tolist() == [w0 * 1000 >> 32 for w0, _, _, _ in block]
    assert found.label_drop.tolist() == [w1 / 2**32 < 0.1 for _, w1, _, _ in block]
    assert found.flip.tolist() == [w2 >= 1 << 31 for _, _, w2, _ in block]


@pytest.mark.parametrize("cuts", [(100,), (1, 99), (37, 40, 23), (25,) * 4])
def test_any_split_over_ranks_and_micro_batches_is_the_same_batch(cuts):
    whole = _draw(500, 100)
    starts = [sum(cuts[:number]) for number in range(len(cuts))]
    by_offset = [_draw(500, size, offset=start) for start, size in zip(starts, cuts, strict=True)]
    by_counter = [_draw(500 + start, size) for start, size in zip(starts, cuts, strict=True)]
    for parts in (by_offset, by_counter):
        assert _same(Draw(*(torch.cat(field) for field in zip(*parts, strict=True))), whole)


def test_purposes_and_seeds_decide_apart():
    one, other, seeded = _many(1000), _many(1000, purpose=Purpose.EVAL), _many(1000, seed=1)
    for apart in (other, seeded):
        # Independent t of 1000 values agree at Poisson(1) places; coins at Binomial(1000, 1/2).
        assert (one.t_index == apart.t_index).sum() <= scipy.stats.poisson.isf(RARE, 1)
        assert abs((one.flip == apart.flip).sum() - 500) <= scipy.stats.norm.isf(RARE / 2) * math.sqrt(250)


def test_the_counter_is_left_as_it_was():
    counter = torch.tensor(7)
    found = draw(counter, batch_size=2, **HOW)
    found.ids.add_(1)
    assert counter.item() == 7


def test_numbers_of_images_end_below_two_to_the_63():
    largest, how = 1 << 62, {**HOW, "batch_size": 8}
    last = draw(torch.tensor(largest - 9), offset=largest, **how)
    assert last.ids[-1] == (1 << 63) - 2 and (last.sample_index < HOW["dataset_size"]).all()
    for counter, offset in ((largest - 7, largest), (largest, largest), (largest, largest - 7)):
        with pytest.raises(ValueError, match=rf"draw: counter: given {counter}, allowed 0 to {(1 << 63) - 9 - offset}"):
            draw(torch.tensor(counter), offset=offset, **how)


def test_label_drop_zero_and_one_are_exact():
    assert not _many(20_000, label_drop=0.0).label_drop.any()
    assert _many(20_000, label_drop=1.0).label_drop.all()


def test_label_drop_is_exact_to_one_word():
    word = words(HOW["seed"], Purpose.TRAIN, Stream.SCALARS, torch.tensor([0]), torch.tensor([0]))[0, 0, 1].item()
    assert not _draw(0, 1, label_drop=word / 2**32).label_drop.item()  # below the word: not
    assert _draw(0, 1, label_drop=(word + 1) / 2**32).label_drop.item()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_labels_drop_at_the_frequency_asked(probability):
    dropped = _many(20_000, label_drop=probability).label_drop.sum().item()
    assert scipy.stats.binomtest(dropped, 20_000, probability).pvalue >= RARE


def test_decisions_of_an_image_are_independent():
    found = _many(20_000, label_drop=0.5)
    coins = {"t": found.t_index >= 500, "drop": found.label_drop, "flip": found.flip}
    assert scipy.stats.binomtest(found.flip.sum().item(), 20_000, 0.5).pvalue >= RARE
    for one, other in (("t", "drop"), ("t", "flip"), ("drop", "flip")):
        agreed = (coins[one] == coins[other]).sum().item()
        assert scipy.stats.binomtest(agreed, 20_000, 0.5).pvalue >= RARE, (one, other)


@pytest.mark.parametrize("num_timesteps", [1, 7, 1000])
def test_timesteps_are_in_range_and_uniform(num_timesteps):
    found = _many(50_000, num_timesteps=num_timesteps).t_index
    counts = found.bincount(minlength=num_timesteps)
    assert found.min() == 0 and found.max() == num_timesteps - 1
    if num_timesteps > 1:
        assert scipy.stats.chisquare(counts.numpy()).pvalue >= RARE


def test_timesteps_of_the_largest_grid_do_not_overflow():
    found = _many(1000, num_timesteps=1 << 31).t_index.double() / 2**31
    assert scipy.stats.kstest(found.numpy(), "uniform").pvalue >= RARE


def test_each_sample_appears_once_an_epoch():
    first, second = _draw(0, 74).sample_index.split(37)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(37))
    assert not torch.equal(first, second)


def _times(counter: int, batch_size: int, **how) -> torch.Tensor:
    return _draw(counter, batch_size, **how).t_index


def test_times_alone_depend_on_table_and_strata():
    table = torch.linspace(0, 1, 1000, dtype=torch.float64).square().mul(2**32).long()
    plain = _draw(77, 100)
    for how in ({"t_table": table}, {"strata": 50}, {"t_table": table, "strata": 50}):
        other = _draw(77, 100, **how)
        assert (other.t_index != plain.t_index).sum() > 90
        assert _same(other._replace(t_index=plain.t_index), plain)
    assert _same(_draw(77, 100, t_table=None, strata=0), plain)


@pytest.mark.parametrize("strata", [1, 5, 8, 125, 1000])
@pytest.mark.parametrize("batch", [0, 3, 1 << 33])
def test_every_stratum_comes_once_in_a_batch(strata, batch):
    part = _times(batch * strata, strata, strata=strata) // (1000 // strata)
    assert part.sort().values.tolist() == list(range(strata))


@pytest.mark.parametrize(("strata", "size"), [(7, 1000), (96, 65_536), (1000, 7)])
def test_every_time_comes_as_often_in_a_batch_as_even_times_do(strata, size):
    # A word's stratum is the number of strata borders up to it, whether or not the grid's are the same.
    counts = _times(5 * strata, strata, strata=strata, num_timesteps=size).bincount(minlength=size)
    below = counts.cumsum(0)
    even = torch.arange(1, size + 1) * strata / size
    assert ((below - even).abs() < 1).all()  # strata wholly below a time count, that which it cuts may


@pytest.mark.parametrize("cuts", [(96,), (1, 95), (37, 40, 19), (24,) * 4])
def test_strata_do_not_depend_on_how_a_batch_is_cut(cuts):
    how = {"strata": 32, "t_table": torch.arange(1, 1001) ** 2 * (1 << 32) // 1000**2}
    for counter in (0, 96, 45):  # from 45, a batch straddles the call's ends
        whole = _draw(counter, 96, **how)
        starts = [sum(cuts[:number]) for number in range(len(cuts))]
        by_offset = [_draw(counter, size, offset=start, **how) for start, size in zip(starts, cuts, strict=True)]
        by_counter = [_draw(counter + start, size, **how) for start, size in zip(starts, cuts, strict=True)]
        for parts in (by_offset, by_counter):
            assert _same(Draw(*(torch.cat(field) for field in zip(*parts, strict=True))), whole)
    assert torch.equal(_times(45, 96, **how)[51:], _times(96, 45, **how))


def test_strata_have_another_order_in_each_batch_purpose_and_seed():
    orders = [
        _times(batch * 1000, 1000, strata=1000, purpose=purpose, seed=seed)
        for batch in (0, 1, 1 << 32)
        for purpose in (Purpose.TRAIN, Purpose.EVAL)
        for seed in (3, 4)
    ]
    for number, one in enumerate(orders):
        for other in orders[:number]:  # two random orders agree at Poisson(1) places
            assert (one == other).sum() <= scipy.stats.poisson.isf(RARE, 1)


def test_times_of_one_position_are_uniform_over_batches():
    t_index = _many(40_000, strata=8, num_timesteps=40).t_index.view(5000, 8)
    for position in t_index.unbind(1):
        assert scipy.stats.chisquare(position.bincount(minlength=40).numpy()).pvalue >= RARE
    within = (t_index % 5).flatten()  # place in the stratum: each word's own
    assert scipy.stats.chisquare(within.bincount(minlength=5).numpy()).pvalue >= RARE
    same = (t_index[:, 1:] % 5 == t_index[:, :-1] % 5).sum().item()
    assert scipy.stats.binomtest(same, 35_000, 0.2).pvalue >= RARE


@pytest.mark.parametrize("strata", [1, 12, 1000, 1 << 31])
def test_times_are_the_table_of_the_stratified_words(strata):
    ids = 500 + torch.arange(60)
    word = words(HOW["seed"], Purpose.TRAIN, Stream.SCALARS, ids, torch.tensor([0]))[:, 0, 0]
    word = stratified_word(word, stratum(HOW["seed"], Purpose.TRAIN, ids, strata), strata)
    low, middle, high = word.sort().values[[15, 30, 45]].tolist()
    table = [0, low, middle + 1, middle + 1, high, 1 << 32]  # times 0 and 3 have no words
    found = _times(500, 60, strata=strata, num_timesteps=6, t_table=torch.tensor(table))
    assert found.tolist() == [sum(entry <= number for entry in table) for number in word.tolist()]
    assert set(found.tolist()) == {1, 2, 4, 5}
    assert _times(500, 60, strata=strata).tolist() == [number * 1000 >> 32 for number in word.tolist()]


def test_a_table_is_followed_by_every_batch_to_a_stratum():
    density = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.125, 0.125], dtype=torch.float64)
    table = (density.cumsum(0) * 2**32).long()
    for batch in range(20):  # its borders are borders of strata
        found = _times(16 * batch, 16, strata=16, num_timesteps=6, t_table=table)
        assert found.bincount(minlength=6).tolist() == [4, 0, 8, 0, 2, 2]


def test_the_most_strata_do_not_overflow():
    ids = torch.arange(100, 140)
    found = _times(100, 40, strata=1 << 31, num_timesteps=1 << 31)
    assert torch.equal(found, stratum(HOW["seed"], Purpose.TRAIN, ids, 1 << 31))
    assert scipy.stats.kstest(found.double().numpy() / 2**31, "uniform").pvalue >= RARE


def _table_with(**entries: int) -> torch.Tensor:
    table = torch.arange(1, 1001) * (1 << 32) // 1000
    for place, entry in entries.items():
        table[int(place.lstrip("_"))] = entry
    return table


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strata": -1}, r"strata: given -1, allowed 0 to 2\*\*31"),
        ({"strata": (1 << 31) + 1}, "strata: given 2147483649"),
        ({"t_table": _table_with().float()}, r"t_table: given torch.float32 \(1000,\), allowed torch.int64 \(1000,\)"),
        ({"t_table": _table_with().int()}, r"t_table: given torch.int32"),
        ({"t_table": _table_with()[1:]}, r"t_table: given torch.int64 \(999,\), allowed torch.int64 \(1000,\)"),
        ({"t_table": _table_with()[None]}, r"t_table: given torch.int64 \(1, 1000\)"),
        ({"t_table": _table_with(_500=3)}, r"t_table: given a table that falls or does not end in 2\*\*32"),
        ({"t_table": _table_with(_0=-1)}, "t_table: given a table that falls"),
        ({"t_table": _table_with(_999=(1 << 32) - 1)}, r"t_table: .* does not end in 2\*\*32"),
        ({"t_table": _table_with(_999=(1 << 32) + 1)}, r"t_table: .* does not end in 2\*\*32"),
        ({"counter": torch.tensor([0])}, r"counter: given torch.int64 \(1,\), allowed an int64 scalar"),
        ({"counter": torch.tensor(0.0)}, r"counter: given torch.float32 \(\)"),
        ({"batch_size": 0}, "batch_size: given 0, allowed 1 or more"),
        ({"counter": torch.tensor(-5)}, "counter: given -5, allowed 0 to 4611686018427387904"),
        ({"offset": -1}, r"offset: given -1, allowed 0 to 2\*\*62"),
        ({"num_timesteps": 0}, "num_timesteps: given 0, allowed 1 to"),
        ({"num_timesteps": (1 << 31) + 1}, "num_timesteps: given 2147483649"),
        ({"label_drop": -0.1}, "label_drop: given -0.1, allowed 0 to 1"),
        ({"label_drop": 1.5}, "label_drop: given 1.5"),
        ({"label_drop": float("nan")}, "label_drop: given nan"),
        ({"dataset_size": 0}, "dataset_size: given 0"),
        ({"seed": -1}, "seed: given -1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"counter": torch.tensor(0), "batch_size": 4, **HOW, **wrong})
