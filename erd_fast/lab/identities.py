"""What weightings have in common: identities between rules, each measured on its schedules (docs/math.md C5, C6)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from erd_fast.diffusion import SCHEDULES, TARGETS, Schedule, get_schedule, loss_factor, loss_weight, weight_table
from erd_fast.diffusion.schedule import Array


@dataclasses.dataclass(frozen=True)
class Identity:
    """A statement about weight tables, and the largest relative difference of its two sides."""

    statement: str
    consequence: str
    schedules: tuple[str, ...]
    difference: float


def measure_identities() -> list[Identity]:
    """Every identity with its two sides computed on each of its schedules."""
    preserving = tuple(name for name in SCHEDULES if get_schedule(name).variance_preserving)
    return [
        _identity(
            "ERD on eps is P2 with k = 1, gamma = 1/2, up to a constant.",
            "Where the variance is preserved, 1/(1 + SNR) is sigma^2: whoever trains eps with that P2 trains ERD.",
            preserving,
            lambda s: (weight_table("erd", "eps", s), weight_table("p2", "eps", s, gamma=0.5)),
        ),
        _identity(
            "ERD on u is the constant weight.",
            "Where the variance is preserved, sqrt(alpha^2 + sigma^2) is 1: ERD changes nothing for u there.",
            preserving,
            lambda s: (weight_table("erd", "u", s), weight_table("constant", "u", s)),
        ),
        _identity(
            "ERD on v is the objective of debiased estimation on eps, up to a constant.",
            "Where the variance is preserved, both weigh the x0 estimate by sqrt(SNR), that is eps by 1/sqrt(SNR).",
            preserving,
            lambda s: (_in_x0_space("erd", "v", s), math.sqrt(2.0) * _in_x0_space("debias", "eps", s)),
        ),
        _identity(
            "ERD on v, read over log-SNR, is the constant weight.",
            "On the trigonometric path |d lambda / dt| is pi / (alpha sigma), the inverse of the v score: under this "
            "reading ERD would be the baseline. The paper reports gains for v: it reads the weight over t.",
            ("gvp",),
            lambda s: (weight_table("erd", "v", s, reading="log_snr"), weight_table("constant", "v", s)),
        ),
        _identity(
            "The two readings of ERD agree, for every target.",
            "Where log-SNR is linear in t, weight over t and effort over log-SNR are one thing (Remark E.2).",
            ("logsnr", "logsnr_flow"),
            lambda s: (
                np.stack([weight_table("erd", target, s) for target in TARGETS]),
                np.stack([weight_table("erd", target, s, reading="log_snr") for target in TARGETS]),
            ),
        ),
        _identity(
            "Min-SNR is one objective for x0, eps and v.",
            "Where the variance is preserved, its three published forms differ by the loss factors alone; on v it "
            "divides by SNR + 1, not by SNR.",
            preserving,
            lambda s: (
                np.stack([_in_x0_space("min_snr", target, s) for target in ("eps", "v")]),
                np.stack([_in_x0_space("min_snr", "x0", s)] * 2),
            ),
        ),
        _identity(
            "SNR on x0 is the constant weight on eps.",
            "The plain eps loss is the SNR-weighted x0 loss, on every schedule.",
            tuple(SCHEDULES),
            lambda s: (_in_x0_space("constant", "eps", s), _in_x0_space("snr", "x0", s)),
        ),
        _identity(
            "SiT's velocity weight on eps is the constant weight on flow.",
            "On every schedule: both are the plain loss of the velocity field d x_t / dt.",
            tuple(SCHEDULES),
            lambda s: (_in_x0_space("sit_velocity", "eps", s), _in_x0_space("constant", "flow", s)),
        ),
        _identity(
            "Target flow is u, and ERD weights it alike.",
            "On the linear path alpha' = -1 and sigma' = 1. ERD is then no constant: sqrt(t^2 + (1 - t)^2), up to its "
            "mean.",
            ("flow",),
            lambda s: (weight_table("erd", "flow", s), weight_table("erd", "u", s)),
        ),
        _identity(
            "Target flow is v times pi / 2, and ERD weights it alike.",
            "On the trigonometric path alpha' = -(pi / 2) sigma and sigma' = (pi / 2) alpha.",
            ("gvp",),
            lambda s: (weight_table("erd", "flow", s), weight_table("erd", "v", s)),
        ),
    ]


def _identity(
    statement: str, consequence: str, schedules: tuple[str, ...], sides: Callable[[Schedule], tuple[Array, Array]]
) -> Identity:
    largest = 0.0
    for name in schedules:
        left, right = sides(get_schedule(name))
        largest = max(largest, float(np.abs(left / right - 1.0).max()))
    return Identity(statement, consequence, schedules, largest)


def _in_x0_space(rule: str, target: str, schedule: Schedule) -> Array:
    """The weight on |x0 estimate - x0|^2 that a weight on ``target`` amounts to."""
    slopes: dict[str, Any] = {"d_alpha": schedule.d_alpha, "d_sigma": schedule.d_sigma}
    weight = loss_weight(rule, target, schedule.alpha, schedule.sigma, **slopes)
    return weight * loss_factor("x0", target, schedule.alpha, schedule.sigma, **slopes)
