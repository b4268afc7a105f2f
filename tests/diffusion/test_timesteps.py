"""Timestep samplers: densities as integer tables, and the draws from them."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erd_fast.diffusion import get_schedule, table_density, timestep_density, timestep_table, weight_table
from erd_fast.errors import ConfigError
from erd_fast.ops import draw
from erd_fast.random import Purpose, Stream, bounded, words

WORDS = 1 << 32
# A cumulative sum of K numbers has K roundings of 2**-53 of the whole, a quotient and a product two more.
WORD_ERROR = 2.0**-21


@given(density=st.lists(st.floats(0, 1e6), min_size=1, max_size=60).filter(any))
@settings(deadline=None, max_examples=40)
def test_a_table_is_the_distribution_function_in_words(density):
    table = timestep_table(np.array(density))
    assert table.dtype == np.int64 and len(table) == len(density) and table[-1] == WORDS
    whole, below = sum(map(Fraction, density)), Fraction(0)
    for entry, weight in zip(table.tolist(), density, strict=True):
        below += Fraction(weight)
        assert abs(entry - below / whole * WORDS) <= 0.5 + (len(density) + 2) * WORD_ERROR
    steps = np.diff(table, prepend=0)
    assert (steps >= 0).all() and (steps[np.array(density) == 0] == 0).all()


@given(density=st.lists(st.floats(0, 1e6), min_size=1, max_size=60).filter(any))
@settings(deadline=None, max_examples=40)
def test_the_density_of_a_table_is_that_given_to_a_word(density):
    table = timestep_table(np.array(density))
    found = table_density(table)
    assert found.sum() == 1.0  # multiples of 2**-32: exact
    exact = np.array(density) / np.sum(density)
    assert np.abs(found - exact).max() <= (1 + 2 * (len(density) + 3) * WORD_ERROR) / WORDS
    assert np.array_equal(timestep_table(found), table)


def test_tables_do_not_depend_on_the_scale_of_the_density():
    density = np.arange(5.0)
    assert np.array_equal(timestep_table(density * 2.0**900), timestep_table(density))
    assert np.array_equal(timestep_table([0, 1, 2, 3, 4]), timestep_table(density))


@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_even_samplers_have_no_density(sampler):
    assert timestep_density(sampler, 10) is None


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5), (1.2, 2.0), (0.0, 20.0), (300.0, 1.0)])
@pytest.mark.parametrize("size", [1, 2, 1000, 65_536])
def test_logit_normal_times_have_its_distribution(size, mean, std):
    density = timestep_density("logit_normal", size, logit_mean=mean, logit_std=std)
    assert density.shape == (size,)
    inner = np.arange(1, size) / size  # t <= x where n <= (logit x - mean) / std
    below = np.append(scipy.stats.norm.cdf((np.log(inner / (1 - inner)) - mean) / std), 1.0)
    # Half a word of the table. Normal distribution functions are right to a few roundings of their own, and change by
    # 1 / std an argument whose logit, up to 11, has a few roundings: 1e-13 is 4e-4 words.
    assert np.abs(timestep_table(density) - below * WORDS).max() <= 0.5 + 1e-3


def test_a_larger_logit_mean_gives_more_noise():
    low, middle, high = (timestep_density("logit_normal", 100, logit_mean=mean) for mean in (-1.0, 0.0, 1.0))
    time = np.arange(100) + 0.5
    assert low @ time < 40 < 60 < high @ time
    assert np.abs(middle - middle[::-1]).max() <= 2 / WORDS and np.abs(low - high[::-1]).max() <= 2 / WORDS
    assert np.array_equal(timestep_density("logit_normal", 100), middle)
    wide = timestep_density("logit_normal", 100, logit_std=2.0)
    assert wide[0] > 10 * middle[0]  # the default deviation is 1


@pytest.mark.parametrize("reading", ["t", "log_snr"])
def test_the_weight_sampler_draws_in_proportion_to_the_weight(reading):
    weight = weight_table("erd", "eps", get_schedule("cosine"), "none", reading)
    found = timestep_density("weight", 1000, weight=weight)
    assert np.abs(found - weight / weight.sum()).max() <= (1 + 2 * 1003 * WORD_ERROR) / WORDS


@pytest.mark.parametrize(
    "density",
    [
        [0.5, -0.1, 0.6],
        [0.5, float("nan")],
        [0.5, float("inf")],
        [0.0, 0.0],
        [],
        [[0.5, 0.5]],
        0.5,
    ],
)
def test_numbers_that_are_no_density_are_refused(density):
    with pytest.raises(ConfigError, match="timestep density: allowed a row of finite numbers >= 0, at least one"):
        timestep_table(np.array(density))


@pytest.mark.parametrize(
    ("sampler", "how", "message"),
    [
        (
            "logitnormal",
            {},
            r"unknown t_sampler 'logitnormal' \(did you mean 'logit_normal'\?\); allowed: uniform, ",
        ),
        ("weight", {}, "t_sampler weight: weight: allowed a table of 10 weights"),
        ("weight", {"weight": np.ones(9)}, "t_sampler weight: weight: allowed a table of 10 weights"),
        ("weight", {"weight": np.zeros(10)}, "timestep density: allowed"),
        *[
            ("logit_normal", {"logit_std": std}, f"given mean 0.0, std {std}, allowed std above 0")
            for std in (0.0, -1.0, float("nan"), float("inf"))
        ],
        ("logit_normal", {"logit_mean": float("nan")}, "given mean nan, std 1.0"),
        ("logit_normal", {"logit_mean": float("inf")}, "given mean inf, std 1.0"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(sampler, how, message):
    with pytest.raises(ConfigError, match=message):
        timestep_density(sampler, 10, **how)


SEED, COUNT = 5, 20_000


def _drawn(table, count=COUNT):
    """Times of ``count`` images, and the words they come from."""
    found = draw(
        torch.tensor(0),
        seed=SEED,
        batch_size=count,
        dataset_size=4096,
        num_timesteps=len(table),
        t_table=torch.from_numpy(table),
    )
    word = words(SEED, Purpose.TRAIN, Stream.SCALARS, torch.arange(count), torch.tensor([0]))[:, 0, 0]
    return found.t_index, word


def test_times_are_drawn_as_often_as_their_probability_says():
    density = np.array([0.0, 1, 5, 0, 0, 2, 3, 20, 0.01, 4, 0])
    t_index, _ = _drawn(timestep_table(density))
    counts = t_index.bincount(minlength=len(density)).numpy()
    p = density / density.sum()
    assert counts.shape == p.shape and (counts[p == 0] == 0).all()
    assert (np.abs(counts - COUNT * p) <= 5 * np.sqrt(COUNT * p * (1 - p))).all()  # binomial


def test_logit_normal_draws_have_its_distribution():
    density = timestep_density("logit_normal", 65_536, logit_mean=-0.3, logit_std=0.8)
    t = (_drawn(timestep_table(density))[0].numpy() + 0.5) / 65_536
    # The grid shifts the distribution function by a step's mass, 1e-5, of 0.035 that a sample may differ by.
    assert scipy.stats.kstest((np.log(t / (1 - t)) + 0.3) / 0.8, "norm").pvalue >= 1e-6


def test_a_time_is_the_number_of_entries_up_to_the_word():
    _, word = _drawn(np.array([WORDS]), 4)
    for image, border in enumerate(word.tolist()):
        assert _drawn(np.array([border, WORDS]), 4)[0][image] == 1  # the first word of time 1
        assert _drawn(np.array([border + 1, WORDS]), 4)[0][image] == 0  # the last of time 0
        assert _drawn(np.array([border, border, border + 1, WORDS]), 4)[0][image] == 2
        assert _drawn(np.array([0, border + 1, border + 1, WORDS]), 4)[0][image] == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 65_536])
def test_an_even_table_draws_what_uniform_times_are(size):
    table = timestep_table(np.ones(size))
    borders = [-(-(k + 1) * WORDS // size) for k in range(size)]  # first word of time k + 1: w K >= (k + 1) 2**32
    assert np.abs(table - np.array(borders)).max() <= (1 if size & (size - 1) else 0)
    t_index, word = _drawn(table)
    apart = t_index != bounded(word, size)
    assert all(np.abs(table - at).min() <= 1 for at in word[apart].tolist())


def test_a_grid_of_many_times_reaches_its_ends():
    t_index, word = _drawn(timestep_table(np.ones(65_536)))
    assert t_index[word.argmin()] == word.min() >> 16 and t_index[word.argmax()] == word.max() >> 16
