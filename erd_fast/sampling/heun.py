"""The deterministic second-order sampler of EDM, for any schedule and target (docs/math.md G1, G2)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from erd_fast.diffusion.schedule import Array, Schedule
from erd_fast.diffusion.target import invert_target
from erd_fast.errors import ConfigError
from erd_fast.sampling.guidance import GuidanceInterval, guided

_SIGMA_MIN, _SIGMA_MAX, _RHO = 0.002, 80.0, 7.0


@torch.no_grad()
def heun(
    model: Any,
    schedule: Schedule,
    target: str,
    noise: Tensor,
    *,
    steps: int = 50,
    labels: Tensor | None = None,
    cfg_scale: float = 1.0,
    guidance_interval: GuidanceInterval | None = None,
) -> Tensor:
    """Integrate the probability flow from noise to samples in ``steps`` Heun steps: 2 ``steps`` - 1 model evaluations.

    In the variable x~ = x_t / alpha the flow is dx~/ds = (x~ - D(x~, s)) / s with s = sigma / alpha (Karras et al.,
    arXiv 2206.00364, Algorithm 1 with sigma(t) = t, s(t) = 1, rho = 7, no churn). Levels lie between max(0.002,
    smallest s) and min(80, largest s) of the schedule; on discrete schedules each is rounded to the training grid. D
    is the x0 that the prediction implies. The state is float64, the model sees the dtype of ``noise``.

    Args:
        model: ``model(x_t, t, y)`` predicts ``target``; x_t (N, C, H, W), t (N,) as trained, y (N,) labels or None.
        schedule: the one it was trained with.
        target: name or alias of what it predicts.
        noise: (N, C, H, W) standard normals.
        labels: (N,) int64, None for an unconditional model.
        cfg_scale: guidance scale; 1 is off. Otherwise ``model.num_classes`` is the null label.
        guidance_interval: where guidance acts; None is everywhere.

    Returns:
        Samples of x0, shape and dtype of ``noise``.

    Raises:
        ConfigError: steps < 1, or guidance asked of a model without labels or without a null label.
    """
    if steps < 1:
        raise ConfigError(f"steps: given {steps}, allowed 1 or more")
    if not 0.0 <= cfg_scale < float("inf"):
        raise ConfigError(f"cfg_scale: given {cfg_scale}, allowed 0 or more")
    if cfg_scale != 1.0 and labels is None:
        raise ConfigError(f"cfg_scale: given {cfg_scale}; guidance needs labels, and this model has none; allowed 1")
    if cfg_scale != 1.0 and not getattr(model, "null_label", True):
        raise ConfigError(f"cfg_scale: given {cfg_scale}; the model was trained without label dropout; allowed 1")

    times, ratios = noise_levels(schedule, steps)
    time_dtype = torch.promote_types(noise.dtype, torch.float32)  # bfloat16 holds no index beyond 256 exactly
    total = float(len(schedule)) if schedule.discrete else 1.0

    def denoise(x: Tensor, level: int, step: int) -> Tensor:
        time, ratio = float(times[level]), float(ratios[level])
        alpha, sigma = (float(value) for value in schedule.alpha_sigma(times[level]))
        d_alpha, d_sigma = (float(value) for value in schedule.derivatives(times[level]))
        acts = guidance_interval is None or guidance_interval.holds(time=time, total=total, sigma=ratio, step=step)
        x_t = alpha * x
        t = torch.full((len(x),), time, dtype=time_dtype, device=noise.device)
        if labels is None:
            prediction = model(x_t.to(noise.dtype), t, None)
        else:
            prediction = guided(model, x_t.to(noise.dtype), t, labels, cfg_scale if acts else 1.0)
        y = prediction[:, : x.shape[1]].double()
        return invert_target(target, y, x_t, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)[0]

    x = noise.double() * float(ratios[0])
    for step in range(steps):
        here, below = float(ratios[step]), float(ratios[step + 1])
        slope = (x - denoise(x, step, step)) / here
        ahead = x + (below - here) * slope
        if step + 1 < steps:
            slope = (slope + (ahead - denoise(ahead, step + 1, step)) / below) / 2
            ahead = x + (below - here) * slope
        x = ahead
    return x.to(noise.dtype)


def noise_levels(schedule: Schedule, steps: int) -> tuple[Array, Array]:
    """Model times (steps,) and their ratios sigma / alpha with a last 0, (steps + 1,), from the noisiest on."""
    grid = schedule.ratio
    high, low = min(_SIGMA_MAX, grid.max()), max(_SIGMA_MIN, grid[grid > 0].min())
    ramp = np.linspace(0.0, 1.0, steps)
    ratios = (high ** (1 / _RHO) + ramp * (low ** (1 / _RHO) - high ** (1 / _RHO))) ** _RHO
    times = schedule.time_at(ratios)
    alpha, sigma = schedule.alpha_sigma(times)
    return times, np.append(sigma / alpha, 0.0)
