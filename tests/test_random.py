"""erd_fast/random.py, the definition of all randomness: Philox words, normals, the order bijection."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.random import (
    Purpose,
    Stream,
    bounded,
    box_muller,
    normals,
    philox_4x32,
    sample_order,
    stratified_word,
    stratum,
    unit_interval,
    words,
)

WORD = 0xFFFFFFFF
SEED = 0xFEDCBA9876543210  # both key words have their top bit in play
# A right generator exceeds each bound below with this probability; seeds are fixed, so it either does or not.
RARE = 1e-6
SIGMAS = scipy.stats.norm.isf(RARE / 2)

# Random123's published vectors (kat_vectors, philox4x32 10): counter, key, words.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def _hex(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert torch.equal(philox_4x32(_hex(counter), _hex(key)), _hex(expected))


def test_philox_takes_many_counters_with_one_key():
    counters = torch.stack([_hex(counter) for counter, _, _ in KNOWN_ANSWERS])
    together = philox_4x32(counters, _hex("a4093822 299f31d0"))
    one_by_one = [philox_4x32(counter, _hex("a4093822 299f31d0")) for counter in counters]
    assert torch.equal(together, torch.stack(one_by_one))
    assert torch.equal(together[2], _hex(KNOWN_ANSWERS[2][2]))


@pytest.mark.parametrize("g", [0, 5, WORD, WORD + 1, (7 << 32) + 9, (1 << 62) + 12345])
def test_words_have_the_documented_counter_and_key(g):
    found = words(SEED, Purpose.LAB, Stream.NOISE, torch.tensor([g]), torch.tensor([3, WORD]))[0]
    for block, word in zip((3, WORD), found, strict=True):
        counter = torch.tensor([block, int(Purpose.LAB) << 8 | int(Stream.NOISE), g & WORD, g >> 32])
        assert torch.equal(word, philox_4x32(counter, torch.tensor([SEED & WORD, SEED >> 32])))


def test_every_part_of_the_name_changes_every_word():
    def of(seed=1, purpose=Purpose.TRAIN, stream=Stream.SCALARS, g=2, block=0):
        return words(seed, purpose, stream, torch.tensor([g]), torch.tensor([block]))[0, 0]

    named = [of(purpose=purpose, stream=stream) for purpose in Purpose for stream in Stream]
    named += [of(g=g) for g in (3, (1 << 32) + 2, (1 << 33) + 2, 1 << 62)]  # the second differs in the high word alone
    named += [of(seed=seed) for seed in (0, 2, (1 << 32) + 1, (1 << 64) - 1)]  # so does the third here
    named += [of(block=block) for block in (1, WORD)]
    table = torch.stack(named)
    for column in table.unbind(1):  # equal words of different names: chance 1e-7 for 31 names
        assert len(column.unique()) == len(named)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed: given {seed}, allowed 0 to 2\*\*64 - 1"):
        words(seed, Purpose.TRAIN, Stream.NOISE, torch.tensor([0]), torch.tensor([0]))


def test_unit_interval_is_never_zero_and_at_most_two_roundings_from_its_formula():
    edges = [0, 1, 2, (1 << 23) - 1, 1 << 24, (1 << 24) + 1, 1 << 31, WORD - 128, WORD - 1, WORD]
    drawn = torch.randint(0, 1 << 32, (10_000,), generator=torch.Generator().manual_seed(0))
    word = torch.cat((torch.tensor(edges), drawn))
    found, exact = unit_interval(word).double(), (word.double() + 0.5) * 2.0**-32  # 33 bits: exact in float64
    assert found[0] == 2.0**-33
    assert found.max() == 1.0
    # The word and the sum are rounded to 24 bits, each by at most 2**-24 of its value.
    assert ((found - exact).abs() <= exact * 2.0**-23 * (1 + 2.0**-20)).all()


def _pairs() -> torch.Tensor:
    """(N, 4) words: all pairs of edges (ends, eighth turns, float32 rounding nearby), small ones, random ones."""
    near = [edge + step for edge in range(0, (1 << 32) + 1, 1 << 29) for step in (-129, -128, -127, -1, 0, 1)]
    edges = torch.tensor(sorted({word for word in near if 0 <= word <= WORD}))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 1 << 32, (100_000, 2), generator=generator)
    tail = torch.stack((drawn[:, 0] >> torch.randint(0, 33, (100_000,), generator=generator), drawn[:, 1]), dim=1)
    return torch.cat((torch.cartesian_prod(edges, edges), tail, drawn)).view(-1, 4)


def test_normals_are_box_muller_in_float64_to_two_millionths():
    word = _pairs()
    found = box_muller(word).double()
    assert found.isfinite().all()
    radius = torch.sqrt(-2.0 * torch.log(unit_interval(word[:, 0::2]).double()))
    angle = 2.0 * math.pi * 2.0**-32 * word[:, 1::2].double()
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    error = (found - expected).abs()
    # The bound that docs/design.md states for every backend; it is absolute, for |n| <= 6.77.
    assert error.max() <= 2e-6
    # Of the radius: log is good to 4 roundings (two values up to twice the result cancel) and 6e-9, the root halves it
    # and rounds; cosine and sine have 2 roundings and 3e-9, the product one.
    assert (error <= 7 * 2.0**-24 * radius.repeat_interleave(2, dim=1)).all()


def test_normals_at_the_ends_of_the_words_are_finite():
    ends = torch.cartesian_prod(*[torch.tensor([0, WORD])] * 4)
    found = box_muller(ends)
    assert found.isfinite().all()
    assert found.abs().max() == pytest.approx(math.sqrt(2 * 33 * math.log(2)), abs=2e-6)  # u = 2**-33, angle 0
    assert (found[ends[:, 0] == WORD][:, :2] == 0).all()  # u = 1 has radius 0


def test_normals_have_the_moments_and_the_law_of_the_standard_normal():
    count = 1 << 18
    x = normals(SEED, Purpose.TRAIN, Stream.NOISE, torch.arange(count // 64), (64,)).double().flatten()
    # k: E x^k and Var x^k = E x^2k - (E x^k)^2 of N(0, 1); the mean of n values has 1/n of that variance.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) <= SIGMAS * math.sqrt(variance / count), power
    assert scipy.stats.kstest(x.numpy(), "norm").pvalue >= RARE


def test_normals_of_neighbours_streams_and_purposes_are_uncorrelated():
    g = torch.arange(4096)
    x = normals(3, Purpose.TRAIN, Stream.NOISE, g, (64,)).double()
    others = {
        "next element": x.roll(1, 1),
        "other half of the pair": x.view(-1, 32, 2).flip(2).reshape(-1, 64),
        "next pair": x.roll(2, 1),
        "next image": x.roll(1, 0),
        "other stream": normals(3, Purpose.TRAIN, Stream.POSTERIOR, g, (64,)).double(),
        "other purpose": normals(3, Purpose.EVAL, Stream.NOISE, g, (64,)).double(),
        "other seed": normals(4, Purpose.TRAIN, Stream.NOISE, g, (64,)).double(),
    }
    # Products of independent standard normals have mean 0, variance 1. A roll, or a swap within pairs, sums some
    # products twice, which doubles the variance of the sum at most.
    for name, other in others.items():
        assert abs((x * other).mean()) <= SIGMAS * math.sqrt(2 / x.numel()), name
        # Box-Muller's pairs share a radius; only right cosines and sines leave the squares uncorrelated as well.
        assert abs(((x**2 - 1) * (other**2 - 1)).mean()) <= SIGMAS * math.sqrt(2 * 4 / x.numel()), name


def test_a_normal_depends_on_its_image_and_element_alone():
    g = torch.tensor([4, 1 << 33, 0, 17, 2, 9])
    whole = normals(SEED, Purpose.SAMPLE, Stream.NOISE, g, (3, 5, 7))  # 105 elements: the last block is cut
    parts = [normals(SEED, Purpose.SAMPLE, Stream.NOISE, part, (3, 5, 7)) for part in g.split((1, 3, 2))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([5, 0, 3, 3, 1, 2, 4])
    assert torch.equal(normals(SEED, Purpose.SAMPLE, Stream.NOISE, g[order], (3, 5, 7)), whole[order])
    for shape in ((105,), (7, 15), (4, 30)):  # the layout gives element numbers, no more
        other = normals(SEED, Purpose.SAMPLE, Stream.NOISE, g, shape).flatten(1)
        assert torch.equal(other[:, :105], whole.flatten(1))


def test_numbers_neither_read_nor_move_the_generator_of_torch():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = normals(1, Purpose.TRAIN, Stream.NOISE, torch.arange(3), (8,))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normals(1, Purpose.TRAIN, Stream.NOISE, torch.arange(3), (8,)), first)


def test_the_unit_interval_is_uniform():
    word = words(SEED, Purpose.LAB, Stream.SCALARS, torch.arange(4000), torch.arange(6))
    assert scipy.stats.kstest(unit_interval(word).double().flatten().numpy(), "uniform").pvalue >= RARE


@given(word=st.integers(0, WORD), limit=st.integers(1, 1 << 31))
@settings(deadline=None, max_examples=30)
def test_bounded_is_the_integer_formula(word, limit):
    assert bounded(torch.tensor(word), limit).item() == (word * limit) >> 32
    assert bounded(torch.tensor([0, WORD]), limit).tolist() == [0, limit - 1]


def test_bounded_is_uniform():
    word = words(SEED, Purpose.TRAIN, Stream.SCALARS, torch.arange(50_000), torch.arange(1)).flatten()
    counts = bounded(word, 1000).bincount(minlength=1000)
    assert len(counts) == 1000
    assert scipy.stats.chisquare(counts.numpy()).pvalue >= RARE  # 200 expected in each cell


def _order_in_integers(seed: int, g: int, size: int, purpose: Purpose = Purpose.ORDER, first_block: int = 0) -> int:
    """The documented network in Python's integers: 12 rounds, MurmurHash3's finalizer, walked until below ``size``."""
    epoch, index = divmod(g, size)
    blocks = torch.arange(first_block, first_block + 3)
    keys = words(seed, purpose, Stream.SCALARS, torch.tensor([epoch]), blocks).flatten().tolist()
    side = max(math.ceil(math.sqrt(size)), 8)
    while True:
        left, right = divmod(index, side)
        for key in keys:
            h = right ^ key
            h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
            h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
            left, right = right, (left + ((h ^ (h >> 16)) * side >> 32)) % side
        index = left * side + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 5, 64, 1797, 60_000, 1 << 32])
def test_order_is_the_documented_network(size):
    g = torch.tensor([0, 1, size - 1, size, 5 * size + size // 3, (1 << 40) + 7])
    assert sample_order(SEED, g, size).tolist() == [_order_in_integers(SEED, number, size) for number in g.tolist()]


@given(size=st.integers(1, 3000), epoch=st.integers(0, 1 << 40), seed=st.integers(0, (1 << 64) - 1))
@settings(deadline=None, max_examples=30)
def test_an_epoch_shows_every_sample_once(size, epoch, seed):
    order = sample_order(seed, epoch * size + torch.arange(size), size)
    assert torch.equal(order.sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 121, 122])
def test_an_epoch_shows_every_sample_once_at_the_edges_of_the_network(size):
    # 64 pairs is the smallest network; squares fill theirs, and one more leaves it nearly as empty as can be.
    order = sample_order(SEED, 7 * size + torch.arange(size), size)
    assert torch.equal(order.sort().values, torch.arange(size))


def test_order_of_the_largest_data_set_does_not_collide():
    size = 1 << 32
    order = sample_order(SEED, 3 * size + torch.arange(0, size, size // 10_007), size)
    assert len(order.unique()) == len(order)
    assert order.min() >= 0 and order.max() < size
    assert scipy.stats.kstest(order.double().numpy() / size, "uniform").pvalue >= RARE


def test_order_differs_between_epochs_and_seeds():
    g = torch.arange(1000)
    orders = [sample_order(seed, epoch * 1000 + g, 1000) for seed in (0, 1, 1 << 32) for epoch in (0, 1, 1 << 32)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            # Two random orders agree at Poisson(1) places.
            assert (one == other).sum() <= scipy.stats.poisson.isf(RARE, 1)


def test_a_batch_may_straddle_epochs():
    epochs = [sample_order(5, epoch * 10 + torch.arange(10), 10) for epoch in range(4)]
    assert torch.equal(sample_order(5, torch.arange(7, 33), 10), torch.cat(epochs)[7:33])


def _chi_square(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2).sum() / expected)


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_orders_of_small_data_sets_are_unbiased(size):
    epochs = 5000
    orders = sample_order(SEED, torch.arange(epochs * size), size).view(epochs, size).numpy()

    # Position by sample. Rows and columns have fixed sums, so (size - 1)^2 directions remain; permutation matrices
    # spread evenly over them with variance 1 / (size - 1) each, hence the factor (size - 1) / size.
    table = np.zeros((size, size))
    np.add.at(table, (np.arange(size), orders), 1)
    statistic = _chi_square(table, epochs / size) * (size - 1) / size
    assert statistic <= scipy.stats.chi2.isf(RARE, (size - 1) ** 2)

    # Ordered pairs at neighbouring positions: size (size - 1) equally likely ones, independent between epochs.
    pairs = size * (size - 1)
    for position in range(size - 1):
        counts = np.bincount(orders[:, position] * size + orders[:, position + 1], minlength=size * size)
        counts = counts.reshape(size, size)[~np.eye(size, dtype=bool)]
        assert _chi_square(counts, epochs / pairs) <= scipy.stats.chi2.isf(RARE, pairs - 1)

    if size <= 5:  # whole permutations: size! equally likely ones
        _, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(counts) == math.factorial(size)
        assert _chi_square(counts, epochs / len(counts)) <= scipy.stats.chi2.isf(RARE, len(counts) - 1)


def test_neighbouring_epochs_are_unrelated():
    size, epochs = 5, 5000
    orders = sample_order(SEED, torch.arange(epochs * size), size).view(epochs, size)
    # (first sample of an even epoch, first of the odd one after it): size^2 equally likely cells, independent pairs.
    counts = (orders[0::2] * size + orders[1::2])[:, 0].bincount(minlength=size * size).numpy()
    assert _chi_square(counts, epochs / 2 / size**2) <= scipy.stats.chi2.isf(RARE, size * size - 1)


@pytest.mark.parametrize("size", [0, -3, (1 << 32) + 1])
def test_order_refuses_sizes(size):
    with pytest.raises(ValueError, match=rf"dataset_size: given {size}, allowed 1 to 2\*\*32"):
        sample_order(0, torch.arange(3), size)


SIZES = [1, 2, 3, 7, 63, 64, 65, 100, 1000]


@pytest.mark.parametrize("size", [*SIZES, 1 << 31])
@pytest.mark.parametrize("purpose", [Purpose.TRAIN, Purpose.EVAL])
def test_a_stratum_is_the_documented_network_of_the_batch(size, purpose):
    g = torch.tensor([0, 1, size - 1, size, 5 * size + size // 3, (1 << 40) + 7])
    expected = [_order_in_integers(SEED, number, size, purpose, first_block=1) for number in g.tolist()]
    assert stratum(SEED, purpose, g, size).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_each_batch_takes_every_stratum_once_in_an_order_of_its_own(size):
    batches = torch.cat((torch.arange(50), torch.tensor([1 << 32, 1 << 40])))
    g = batches[:, None] * size + torch.arange(size)
    found = stratum(SEED, Purpose.TRAIN, g.flatten(), size).view(-1, size)
    assert torch.equal(found.sort(dim=1).values, torch.arange(size).expand_as(found))
    if size >= 63:
        assert len(found.unique(dim=0)) == len(found)
        # Its order says nothing of the samples': where they agree is Poisson with one place a batch.
        same = (found == sample_order(SEED, g.flatten(), size).view(-1, size)).sum()
        assert same <= scipy.stats.poisson.isf(RARE, len(found))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_strata_of_small_batches_are_unbiased(size):
    found = stratum(SEED, Purpose.TRAIN, torch.arange(5000 * size), size).view(5000, size)
    for position in found.unbind(1):
        assert scipy.stats.chisquare(position.bincount(minlength=size).numpy()).pvalue >= RARE


@given(data=st.data(), strata=st.integers(1, 1 << 31) | st.sampled_from([1, 2, 3, (1 << 31) - 1, 1 << 31]))
@settings(deadline=None, max_examples=60)
def test_a_stratified_word_lies_within_its_part(data, strata):
    part = data.draw(st.sampled_from([0, strata - 1]) | st.integers(0, strata - 1))
    word = data.draw(st.sampled_from([0, WORD]) | st.integers(0, WORD))
    found = stratified_word(torch.tensor([word]), torch.tensor([part]), strata).item()
    assert 0 <= found <= WORD
    # A word stands for the interval [w, w + 1): of the part's, it is the one with the place that the word had in all.
    assert found * strata <= (part << 32) + word < (found + 1) * strata
    assert part * 2**32 < (found + 1) * strata and found * strata < (part + 1) * 2**32
    if strata & (strata - 1) == 0:  # the borders of parts are whole words
        assert part << 32 <= found * strata < (part + 1) << 32


def test_the_words_of_one_stratum_are_all_words():
    word = torch.tensor([0, 1, 12345, WORD])
    assert torch.equal(stratified_word(word, torch.zeros(4, dtype=torch.int64), 1), word)
    ends = stratified_word(word[[0, -1]], torch.tensor([3, 3]), 8)
    assert ends.tolist() == [3 << 29, (4 << 29) - 1]
