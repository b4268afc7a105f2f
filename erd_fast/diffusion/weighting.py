"""Loss weightings w(t), ERD among them (docs/math.md C)."""

from collections.abc import Callable
from typing import Any, Literal

from erd_fast.diffusion.schedule import Array, Schedule
from erd_fast.diffusion.target import resolve_target, target_coefficients
from erd_fast.errors import ConfigError, unknown_name

Normalize = Literal["mean", "none", "max"]


def _constant(target: str, alpha: Any, sigma: Any) -> Any:
    return 1.0 + 0.0 * alpha


def _erd(target: str, alpha: Any, sigma: Any) -> Any:
    """Recoverability score omega_y = sqrt((c_x alpha)^2 + (c_eps sigma)^2) (ERD paper Eq. 11)."""
    c_x, c_eps = target_coefficients(target, alpha, sigma)
    return ((c_x * alpha) ** 2 + (c_eps * sigma) ** 2) ** 0.5


RULES: dict[str, Callable[[str, Any, Any], Any]] = {"constant": _constant, "erd": _erd}


def loss_weight(rule: str, target: str, alpha: Any, sigma: Any, *, normalizer: float = 1.0) -> Any:
    """w = rule(target, alpha, sigma) / normalizer, in the type of ``alpha``: float, NumPy array or tensor.

    ``erd``: sqrt((c_x alpha)^2 + (c_eps sigma)^2), with (c_x, c_eps) of the target: alpha for x0, sigma for eps,
    sqrt(2) alpha sigma for v, sqrt(alpha^2 + sigma^2) for u. ``constant``: 1.

    Raises:
        ConfigError: unknown rule or target.
    """
    if rule not in RULES:
        raise ConfigError(unknown_name("weighting", rule, RULES))
    return RULES[rule](resolve_target(target), alpha, sigma) / normalizer


def weight_table(rule: str, target: str, schedule: Schedule, normalize: Normalize = "mean") -> Array:
    """w on the schedule's grid, (K,) float64.

    ``normalize``: ``mean`` divides by Z = mean of w over the grid, so that uniform t keeps the average loss scale (ERD
    paper, section 4); ``max`` divides by the largest; ``none`` leaves w as the rule gives it.

    Raises:
        ConfigError: unknown rule, target or normalisation.
    """
    table = loss_weight(rule, target, schedule.alpha, schedule.sigma)
    if normalize == "mean":
        return table / table.mean()
    if normalize == "max":
        return table / table.max()
    if normalize == "none":
        return table
    raise ConfigError(unknown_name("normalize", normalize, ("mean", "none", "max")))
