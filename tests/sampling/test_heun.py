"""The sampler: its noise levels, its steps, and the law it reaches with an exact denoiser."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from erd_fast.diffusion import SCHEDULES, TARGETS, DiscreteSchedule, Schedule, get_schedule, target_coefficients
from erd_fast.errors import ConfigError
from erd_fast.sampling import heun
from erd_fast.sampling.heun import noise_levels

ROUND64 = 2.0**-53
CENTRES = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]], dtype=torch.float64)
SPREAD = 0.3


class _Mixture:
    """The best prediction of ``target`` for data of equal Gaussians in the plane; x is (N, 2, 1, 1)."""

    def __init__(self, schedule: Schedule, target: str, centres: Tensor = CENTRES):
        self.schedule, self.target, self.centres, self.times = schedule, target, centres, []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.times.append(t[0].item())
        alpha, sigma = (value[0].item() for value in self.schedule.alpha_sigma(t))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        offset = x.view(-1, 1, 2) - alpha * self.centres
        share = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=1)[..., None]
        x_start = (share * (self.centres + alpha * SPREAD**2 / variance * offset)).sum(1)
        eps = (share * sigma / variance * offset).sum(1)
        d_alpha, d_sigma = (value[0].item() for value in self.schedule.derivatives(t))
        c_x, c_eps = target_coefficients(self.target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
        return (c_x * x_start + c_eps * eps).view(x.shape)


def _noise(count: int) -> Tensor:
    return torch.randn(count, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def _samples(schedule: str, target: str) -> Tensor:
    grid = get_schedule(schedule)
    return heun(_Mixture(grid, target), grid, target, _noise(16_000)).view(-1, 2)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_exact_denoiser_reaches_the_law_of_the_data(schedule):
    x = _samples(schedule, "x0")
    count, sigmas = len(x), 5.0  # a chance of 6e-7 each
    mode = torch.cdist(x, CENTRES).argmin(1)
    for number, centre in enumerate(CENTRES):
        own = x[mode == number]
        assert abs(len(own) / count - 0.25) <= sigmas * math.sqrt(0.25 * 0.75 / count)
        assert ((own.mean(0) - centre).abs() <= sigmas * SPREAD / math.sqrt(len(own))).all()
        # The mean square of n normals of known mean deviates by sqrt(2 / n) of itself.
        square = (own - centre).square().mean(0) / SPREAD**2
        assert ((square - 1).abs() <= sigmas * math.sqrt(2 / len(own))).all()
        product = (own - centre).prod(1).mean() / SPREAD**2
        assert abs(product) <= sigmas / math.sqrt(len(own))


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("target", ["eps", "v", "u", "flow"])
def test_every_target_gives_the_samples_of_the_same_denoiser(target, schedule):
    # x0 from a prediction magnifies its rounding by up to sigma / alpha <= 80; 99 evaluations of some 20 roundings,
    # and the flow between modes parts neighbours by up to the ratio of their distances: allow a thousandfold.
    bound = 80 * 99 * 20 * ROUND64 * 1000
    assert (_samples(schedule, target) - _samples(schedule, "x0")).abs().max() <= bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_gaussian_is_scaled_by_the_product_of_the_steps(schedule, target):
    grid, centre = get_schedule(schedule), CENTRES[:1]
    found = heun(_Mixture(grid, target, centre), grid, target, _noise(100)).view(-1, 2)
    # D = m + S^2 / (S^2 + s^2) (x - m), so that dx/ds = rate(s) (x - m), and each of Algorithm 1's steps is a factor.
    ratios = noise_levels(grid, 50)[1].tolist()

    def rate(s: float) -> float:
        return s / (SPREAD**2 + s**2)

    factor = 1.0
    for s, below in itertools.pairwise(ratios[:-1]):
        h = below - s
        factor *= 1 + h / 2 * (rate(s) + rate(below) * (1 + h * rate(s)))
    factor *= 1 - ratios[-2] * rate(ratios[-2])  # Euler to 0
    expected = centre + factor * (ratios[0] * _noise(100).view(-1, 2) - centre)
    # An evaluation at s is off by some 40 roundings of |x0| + s |eps|, in every target: x0 = (sigma y - c_eps x_t) / D
    # has |c_eps| alpha <= |D| and sigma (|c_x x0| + |c_eps eps|) <= |D| (|x0| + s |eps|). A step carries no more than
    # that into x, of which S / sqrt(S^2 + s^2) is left at the end: with |x0| <= 3.5 and |eps| <= 5 at most 4, 99 times.
    assert (found - expected).abs().max() <= 99 * 40 * 4 * ROUND64
    # The flow's own factor is S / sqrt(S^2 + s_0^2). A step of h in ln s is off by some h^3 / 6: with h about 0.15 over
    # the ln(80 / S) = 5.6 in which x shrinks, by 0.02 in all.
    assert factor * math.hypot(SPREAD, ratios[0]) / SPREAD == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("target", ["eps", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 18, 50])
def test_a_step_costs_two_evaluations_and_the_last_one(steps, schedule, target):
    grid = get_schedule(schedule)
    model = _Mixture(grid, target)
    heun(model, grid, target, _noise(3), steps=steps)
    times = noise_levels(grid, steps)[0].tolist()
    assert len(model.times) == 2 * steps - 1
    assert model.times[0::2] == times  # a step begins at its own level and looks ahead to the next
    assert model.times[1::2] == times[1:]


def test_fifty_steps_of_99_evaluations_are_the_default():
    grid = get_schedule("cosine")
    model = _Mixture(grid, "eps")
    heun(model, grid, "eps", _noise(1))
    assert len(model.times) == 99


def test_levels_on_cosine_are_the_published_ones():
    schedule = get_schedule("cosine")
    grid = schedule.sigma / schedule.alpha
    assert abs(grid[0] - 0.0064254) <= 0.5e-7 and abs(grid[-1] - 20291) <= 0.5
    times, ratios = noise_levels(schedule, 50)
    assert times[0] == 991 and times[-1] == 0
    assert len(set(times.tolist())) == 50 and (np.diff(times) < 0).all()
    assert ratios[:-1].tolist() == grid[times.astype(int)].tolist() and ratios[-1] == 0
    # 80 and 0.0064 up to the grid: the spacing of its levels there is 13 percent and 48 percent.
    assert abs(ratios[0] - 80) <= np.diff(grid)[990:992].max() / 2 and ratios[-2] == grid[0]


def test_levels_on_cosine_are_those_of_edm_s_recursion():
    # Karras et al., Table 1, iDDPM column: from u_M = 0, u_{j-1}^2 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, 0.001) - 1,
    # with abar_j = sin^2(pi / 2 * j / (M (0.008 + 1))). Our index is M - 1 - j.
    schedule, steps = get_schedule("cosine"), 1000
    levels, u = [], 0.0

    def abar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (steps * 1.008)) ** 2

    for j in range(steps, 0, -1):
        u = math.sqrt((u**2 + 1) / max(abar(j - 1) / abar(j), 0.001) - 1)
        levels.append(u)
    # u^2 + 1 is a product with some 6 roundings a factor; taking 1 away magnifies its relative error by 1 + 1 / u^2.
    u_square = np.square(levels)
    bound = 6 * np.arange(1, steps + 1) * ROUND64 * (1 + 1 / u_square)
    assert (np.abs((schedule.sigma / schedule.alpha) / levels - 1) <= bound).all()


def test_levels_of_continuous_schedules_are_edm_s_own():
    times, ratios = noise_levels(get_schedule("flow"), 50)
    ramp = [(80 ** (1 / 7) + i / 49 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(50)]
    assert np.allclose(ratios[:-1], ramp, rtol=100 * ROUND64, atol=0)  # the seventh power, and t near 1
    assert np.allclose(times, [s / (1 + s) for s in ramp], rtol=100 * ROUND64, atol=0) and ratios[-1] == 0


@pytest.mark.parametrize("schedule", ["vp", "gvp", "logsnr_flow"])
def test_levels_of_every_continuous_schedule_lie_within_its_grid(schedule):
    grid = get_schedule(schedule)
    times, ratios = noise_levels(grid, 50)
    low = math.exp(-5 + 10 / 131_072) if schedule == "logsnr_flow" else 0.002
    ramp = [(80 ** (1 / 7) + i / 49 * (low ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(50)]
    # By way of t. gvp: t is off by 8 roundings and so alpha, of at least 1/81, by 8 pi / 2 + 12: 2000. vp: t by 80, and
    # ln alpha by 10 times that and 34. logsnr_flow: t by 5, and ln s by 10 times that and 20. The seventh power: 70.
    assert np.allclose(ratios[:-1], ramp, rtol=2100 * ROUND64, atol=0) and ratios[-1] == 0
    alpha, sigma = grid.alpha_sigma(times)
    assert (sigma / alpha).tolist() == ratios[:-1].tolist()


@pytest.mark.parametrize("schedule", ["ddpm_linear", "logsnr"])
def test_levels_of_every_discrete_schedule_are_the_nearest_of_its_grid(schedule):
    grid = get_schedule(schedule)
    levels = (grid.sigma / grid.alpha).tolist()
    times, ratios = noise_levels(grid, 50)
    for i, (time, ratio) in enumerate(zip(times.tolist(), ratios.tolist()[:-1], strict=True)):
        wanted = (80 ** (1 / 7) + i / 49 * (levels[0] ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert time == min(range(1000), key=lambda k: abs(levels[k] - wanted)) and ratio == levels[int(time)]


@pytest.mark.parametrize("target", TARGETS)
def test_a_table_without_signal_at_its_end_starts_at_its_last_signal(target):
    alpha = np.append(np.cos(np.linspace(0.01, 0.99, 99) * np.pi / 2), 0.0)
    grid = DiscreteSchedule("mine", alpha)
    model = _Mixture(grid, target)
    found = heun(model, grid, target, _noise(50), steps=20)
    assert model.times[0] == 98 and found.isfinite().all() and found.abs().max() < 2 + 8 * SPREAD


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_steps_are_those_of_algorithm_1(schedule):
    grid = get_schedule(schedule)
    times, ratios = noise_levels(grid, 7)
    oracle = _Mixture(grid, "x0")

    def denoised(x: Tensor, level: int) -> Tensor:
        t = torch.full((len(x),), times[level], dtype=torch.float64)
        return oracle(grid.alpha_sigma(times[level])[0].item() * x, t, None)

    x = ratios[0] * _noise(5)
    for i in range(7):
        d = (x - denoised(x, i)) / ratios[i]
        ahead = x + (ratios[i + 1] - ratios[i]) * d
        if ratios[i + 1] > 0:
            d_ahead = (ahead - denoised(ahead, i + 1)) / ratios[i + 1]
            ahead = x + (ratios[i + 1] - ratios[i]) * (0.5 * d + 0.5 * d_ahead)
        x = ahead
    found = heun(_Mixture(grid, "x0"), grid, "x0", _noise(5), steps=7)
    # 13 evaluations of some 20 roundings of values up to 80 times 5, in another order of summation.
    assert (found - x).abs().max() <= 13 * 20 * 400 * ROUND64


def test_error_falls_with_the_square_of_the_steps():
    grid = get_schedule("flow")
    fine = heun(_Mixture(grid, "u"), grid, "u", _noise(200), steps=640)

    def error(steps: int) -> float:
        return (heun(_Mixture(grid, "u"), grid, "u", _noise(200), steps=steps) - fine).abs().median().item()

    # Second order: four times smaller at twice the steps (two times for a first order method); 3 leaves room for the
    # last step, which is first order over an interval that shrinks less than the others.
    assert error(80) / error(160) >= 3


def test_one_step_is_the_denoised_start():
    grid = get_schedule("flow")
    found = heun(_Mixture(grid, "eps"), grid, "eps", _noise(4), steps=1)
    alpha = 1 / 81  # sigma / alpha = 80
    t = torch.full((4,), 80 / 81, dtype=torch.float64)
    expected = _Mixture(grid, "x0")(alpha * 80 * _noise(4), t, None)
    assert (found - expected).abs().max() <= 80 * 40 * 5 * ROUND64  # x0 from eps: sigma / alpha times the roundings


def test_more_steps_than_training_times_stay_finite():
    grid = get_schedule("cosine", 20)
    found = heun(_Mixture(grid, "v"), grid, "v", _noise(50), steps=50)
    assert found.isfinite().all() and found.abs().max() < 2 + 8 * SPREAD


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_the_model_sees_the_dtype_of_the_noise_and_the_exact_time(schedule, dtype):
    grid, seen = get_schedule(schedule), []

    def model(x, t, y):
        seen.append((x.dtype, t[0].item()))
        return torch.zeros_like(x)

    assert heun(model, grid, "x0", torch.zeros(1, 1, 1, 1, dtype=dtype), steps=50).dtype == dtype
    assert {kind for kind, _ in seen} == {dtype}
    times = noise_levels(grid, 50)[0]
    # Times are float32 at least: bfloat16 has 8 bits and would turn step 991 into 992.
    assert np.abs(np.array([t for _, t in seen][0::2]) / np.maximum(times, 1e-9) - 1)[times > 0].max() <= 2.0**-24


def test_learned_variance_channels_are_left_out():
    grid = get_schedule("cosine")
    oracle = _Mixture(grid, "eps")

    def wide(x, t, y):
        return torch.cat((oracle(x, t, y), torch.full_like(x, 1e6)), dim=1)

    assert torch.equal(heun(wide, grid, "eps", _noise(3), steps=5), heun(oracle, grid, "eps", _noise(3), steps=5))


def test_no_gradient_is_kept():
    scale = torch.ones((), requires_grad=True)
    assert not heun(lambda x, t, y: scale * x, get_schedule("cosine"), "eps", _noise(1), steps=2).requires_grad


def test_target_aliases_are_known():
    grid = get_schedule("cosine")
    one, other = (heun(_Mixture(grid, "v"), grid, name, _noise(2), steps=3) for name in ("v", "velocity"))
    assert torch.equal(one, other)


class _Unconditional:
    num_classes, null_label = 10, False

    def __call__(self, x, t, y):
        return x


def test_what_cannot_be_sampled_is_refused():
    grid, noise = get_schedule("cosine"), _noise(2)
    with pytest.raises(ConfigError, match="steps: given 0, allowed 1 or more"):
        heun(_Unconditional(), grid, "eps", noise, steps=0)
    with pytest.raises(ConfigError, match=r"cfg_scale: given 2.0; guidance needs labels"):
        heun(_Unconditional(), grid, "eps", noise, cfg_scale=2.0)
    with pytest.raises(ConfigError, match=r"cfg_scale: given 1.5; the model was trained without label dropout"):
        heun(_Unconditional(), grid, "eps", noise, cfg_scale=1.5, labels=torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="unknown target 'vel'"):
        heun(_Unconditional(), grid, "vel", noise)


def test_a_table_without_noise_at_its_beginning_ends_at_its_first_noise():
    schedule = DiscreteSchedule("clean", np.cos(np.arange(50) / 50 * np.pi / 2))  # sigma[0] is 0
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    samples = heun(lambda x, t, y: torch.zeros_like(x), schedule, "x0", noise, steps=60)
    assert torch.isfinite(samples).all()
    assert schedule.time_at(np.array([0.0, 1e-9])).tolist() == [1.0, 1.0]
