"""Regression targets y = c_x x0 + c_eps eps, and back from a prediction to x0 and eps (docs/math.md B)."""

import warnings
from collections.abc import Callable
from typing import Any

from erd_fast.diffusion.schedule import Schedule
from erd_fast.errors import ConfigError, unknown_name

# Each rule: (alpha, sigma) -> (c_x, c_eps); written so that floats, arrays and tensors all work.
TARGETS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "x0": lambda alpha, sigma: (1.0 + 0.0 * alpha, 0.0 * alpha),
    "eps": lambda alpha, sigma: (0.0 * alpha, 1.0 + 0.0 * alpha),
    "v": lambda alpha, sigma: (-sigma, 1.0 * alpha),  # Salimans & Ho, arXiv 2202.00512
    "u": lambda alpha, sigma: (-1.0 + 0.0 * alpha, 1.0 + 0.0 * alpha),  # eps - x0 on every schedule; t = 0 is data
}
ALIASES = {"sample": "x0", "x_start": "x0", "epsilon": "eps", "v_prediction": "v", "velocity": "v"}


def resolve_target(name: str, schedule: Schedule | None = None) -> str:
    """The target's own name for a name or alias.

    ``v`` on a schedule that is not variance preserving warns and names ``u``: what flow-matching code calls the
    velocity is ``u`` here.

    Raises:
        ConfigError: unknown name.
    """
    target = ALIASES.get(name, name)
    if target not in TARGETS:
        raise ConfigError(unknown_name("target", name, [*TARGETS, *ALIASES]))
    if target == "v" and schedule is not None and not schedule.variance_preserving:
        warnings.warn(
            f"target 'v' is alpha eps - sigma x0, made for variance-preserving schedules; on {schedule.name!r} the "
            "velocity of flow matching, eps - x0, is target 'u'",
            stacklevel=2,
        )
    return target


def target_coefficients(target: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(c_x, c_eps) of ``target`` at (alpha, sigma), in the type of ``alpha`` (float, array or tensor)."""
    return TARGETS[resolve_target(target)](alpha, sigma)


def invert_target(target: str, prediction: Any, x_t: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(x0, eps) from y and x_t: x0 = (sigma y - c_eps x_t) / D, eps = (c_x x_t - alpha y) / D, D = c_x sigma - c_eps
    alpha.

    ``alpha`` and ``sigma`` broadcast against ``prediction``. D is never 0 for v and u; it is -alpha for eps and
    sigma for x0, which those targets cannot undo where alpha or sigma is 0.
    """
    c_x, c_eps = target_coefficients(target, alpha, sigma)
    determinant = c_x * sigma - c_eps * alpha
    return (sigma * prediction - c_eps * x_t) / determinant, (c_x * x_t - alpha * prediction) / determinant
