"""Guidance: the mix of two predictions, and the noise levels where it acts."""

import pytest
import torch

from erd_fast.diffusion import get_schedule
from erd_fast.errors import ConfigError
from erd_fast.sampling import GuidanceInterval, heun
from erd_fast.sampling.guidance import guided


class _Labelled:
    """Predicts a fixed function of x, t and the label, and keeps what it was asked."""

    num_classes = 10

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x.clone(), t.clone(), y.clone()))
        return 0.1 * x * (1 + y.view(-1, 1, 1, 1)) + 0.01 * t.view(-1, 1, 1, 1)


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5.0, 6.0, 7.0])
LABELS = torch.tensor([0, 9, 4])


def test_guided_is_the_extrapolation_from_the_null_label():
    model = _Labelled()
    found = guided(model, X, T, LABELS, 2.5)
    null = torch.full_like(LABELS, 10)
    with_label, without = _Labelled()(X, T, LABELS), _Labelled()(X, T, null)
    # float32: a difference, a product, a sum, of terms up to 2.5 times the two predictions.
    size = 2.5 * (with_label.abs() + without.abs())
    assert ((found - (-1.5 * without + 2.5 * with_label)).abs() <= 4 * 2.0**-24 * size).all()
    (x, t, y), *rest = model.calls
    assert not rest  # both halves in one pass
    assert torch.equal(x, torch.cat((X, X))) and torch.equal(t, torch.cat((T, T)))
    assert y.tolist() == [*LABELS.tolist(), 10, 10, 10]


@pytest.mark.parametrize(("scale", "label"), [(0.0, 10), (1.0, 4)])
def test_scale_zero_is_the_null_label_and_one_the_label_alone(scale, label):
    model = _Labelled()
    found = guided(model, X, T, torch.full_like(LABELS, 4), scale)
    assert torch.allclose(found, _Labelled()(X, T, torch.full_like(LABELS, label)), rtol=4 * 2.0**-24, atol=0)
    assert len(model.calls[0][0]) == (3 if scale == 1.0 else 6)


def test_scale_one_samples_as_without_guidance():
    one, plain = _Labelled(), _Labelled()
    schedule = get_schedule("cosine")
    found = heun(
        one,
        schedule,
        "eps",
        X,
        steps=5,
        labels=LABELS,
        cfg_scale=1.0,
        guidance_interval=GuidanceInterval(0, 1),
    )
    assert torch.equal(found, heun(plain, schedule, "eps", X, steps=5, labels=LABELS))
    assert all(len(x) == 3 for x, _, _ in (*one.calls, *plain.calls))


def _guided_evaluations(interval: GuidanceInterval | None, schedule: str = "cosine", steps: int = 50) -> list[bool]:
    model = _Labelled()
    heun(
        model,
        get_schedule(schedule),
        "eps",
        X,
        steps=steps,
        labels=LABELS,
        cfg_scale=2.0,
        guidance_interval=interval,
    )
    return [len(x) == 6 for x, _, _ in model.calls]


# Published counts of guided steps of 50 on cosine, by the first evaluation of each step, with the sigma at which the
# interval ends. Step 20 lies on index 900 itself: it is the 30th step up to sigma 6.43 inclusive, and no longer in the
# half-open [0, 0.9) of the time, which therefore guides 29.
@pytest.mark.parametrize(
    ("hi", "sigma", "steps", "up_to_sigma"),
    [
        (0.7, 1.99, 22, 22),
        (0.75, 2.45, 24, 24),
        (0.8, 3.12, 25, 25),
        (0.85, 4.23, 27, 27),
        (0.9, 6.43, 29, 30),
    ],
)
def test_published_intervals_guide_this_many_steps(hi, sigma, steps, up_to_sigma):
    for interval, count in (
        (GuidanceInterval(0, hi), steps),
        (GuidanceInterval(0, sigma, "sigma"), up_to_sigma),
    ):
        evaluations = _guided_evaluations(interval)
        assert len(evaluations) == 99  # first evaluations are every second one, from the noisiest on
        assert evaluations[0::2] == [False] * (50 - count) + [True] * count


def test_no_interval_guides_every_evaluation():
    assert all(_guided_evaluations(None))


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_every_evaluation_decides_by_its_own_time(schedule):
    model, grid = _Labelled(), get_schedule(schedule)
    interval = GuidanceInterval(0.2, 0.6)
    heun(model, grid, "eps", X.double(), steps=20, labels=LABELS, cfg_scale=2.0, guidance_interval=interval)
    total = len(grid) if grid.discrete else 1.0
    for x, t, _ in model.calls:
        assert (len(x) == 6) == (0.2 <= t[0].item() / total < 0.6)
    decisions = [len(x) == 6 for x, _, _ in model.calls]
    assert any(first != second for first, second in zip(decisions[0::2], decisions[1::2], strict=False))


def test_units_name_the_same_levels():
    # Fraction 0.8 of 1000 steps; its sigma on cosine is published as 3.12.
    expected = _guided_evaluations(GuidanceInterval(0, 0.8))
    assert _guided_evaluations(GuidanceInterval(0, 800, "t")) == expected
    assert _guided_evaluations(GuidanceInterval(0, 3.12, "sigma")) == expected
    # Step 25 is the first one whose own time is below 800, but the step before ends there.
    by_step = _guided_evaluations(GuidanceInterval(25, 49, "step"))
    assert by_step[0::2] == expected[0::2] and by_step[1::2] == [False] * 25 + [True] * 24


def test_steps_are_counted_from_the_noise_with_both_evaluations():
    assert _guided_evaluations(GuidanceInterval(1, 2, "step"), steps=5) == [False] * 2 + [True] * 4 + [False] * 3


def _holds(interval: GuidanceInterval, **where) -> bool:
    return interval.holds(**{"time": 0.0, "total": 1000.0, "sigma": 0.0, "step": 0, **where})


@pytest.mark.parametrize(
    ("unit", "field", "values", "expected"),
    [
        ("frac", "time", (199, 200, 799, 800), (False, True, True, False)),  # half open
        ("t", "time", (199, 200, 799, 800), (False, True, True, False)),
        ("sigma", "sigma", (199.9, 200, 800, 800.1), (False, True, True, False)),  # both ends belong to it
        ("step", "step", (199, 200, 800, 801), (False, True, True, False)),
    ],
)
def test_ends_of_the_interval(unit, field, values, expected):
    lo, hi = (0.2, 0.8) if unit == "frac" else (200, 800)
    interval = GuidanceInterval(lo, hi, unit)
    assert tuple(_holds(interval, **{field: value}) for value in values) == expected


def test_every_fraction_of_a_thousand_steps_is_an_exact_end():
    # lo <= t / T < hi with t / T as the user writes it: k / 1000.
    wrong = [
        k
        for k in range(1000)
        if _holds(GuidanceInterval(0, k / 1000), time=k) or not _holds(GuidanceInterval(k / 1000, 1), time=k)
    ]
    assert not wrong


def test_unknown_units_and_empty_intervals_are_refused():
    with pytest.raises(ConfigError, match="guidance unit: given 'snr', allowed frac, t, sigma, step"):
        GuidanceInterval(0, 1, "snr")
    with pytest.raises(ConfigError, match=r"guidance interval: given 0.8 to 0.2, allowed lo <= hi"):
        GuidanceInterval(0.8, 0.2)
    with pytest.raises(ConfigError, match="guidance interval: given nan to 1"):
        GuidanceInterval(float("nan"), 1)
