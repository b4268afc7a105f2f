"""Regression targets y = c_x x0 + c_eps eps: their coefficients, and the way from one to another (docs/math.md B).

Functions take floats, NumPy arrays or tensors for alpha and sigma, which broadcast against the predictions, and give
what they take. ``d_alpha`` and ``d_sigma``, the derivatives by t in [0, 1], are needed for target ``flow`` alone.

Time runs from data at t = 0 to noise. Code that has data at t = 1 (SiT, LightningDiT) predicts x0 - eps where this
package's ``u`` is eps - x0, and its ``flow`` is minus ours: negate the prediction and put 1 - t for t.
"""

import warnings
from collections.abc import Callable
from typing import Any

from erd_fast.diffusion.schedule import Schedule
from erd_fast.errors import ConfigError, unknown_name

# Each rule: (alpha, sigma, d_alpha, d_sigma) -> (c_x, c_eps); written so that floats, arrays and tensors all work.
TARGETS: dict[str, Callable[[Any, Any, Any, Any], tuple[Any, Any]]] = {
    "x0": lambda alpha, sigma, d_alpha, d_sigma: (1.0 + 0.0 * alpha, 0.0 * alpha),
    "eps": lambda alpha, sigma, d_alpha, d_sigma: (0.0 * alpha, 1.0 + 0.0 * alpha),
    "v": lambda alpha, sigma, d_alpha, d_sigma: (-sigma, 1.0 * alpha),  # Salimans & Ho, arXiv 2202.00512
    "u": lambda alpha, sigma, d_alpha, d_sigma: (-1.0 + 0.0 * alpha, 1.0 + 0.0 * alpha),  # eps - x0, any schedule
    "flow": lambda alpha, sigma, d_alpha, d_sigma: (1.0 * d_alpha, 1.0 * d_sigma),  # dx_t/dt; u on schedule flow
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


def target_coefficients(
    target: str, alpha: Any, sigma: Any, *, d_alpha: Any = None, d_sigma: Any = None
) -> tuple[Any, Any]:
    """(c_x, c_eps) of ``target``: (1, 0) for x0, (0, 1) for eps, (-sigma, alpha) for v, (-1, 1) for u, (d_alpha,
    d_sigma) for flow.

    Raises:
        ConfigError: unknown target, or ``flow`` without derivatives.
    """
    target = resolve_target(target)
    if target == "flow" and (d_alpha is None or d_sigma is None):
        raise ConfigError(
            "target flow: d_alpha, d_sigma: not given, allowed the derivatives of alpha and sigma by t "
            "(a schedule's d_alpha and d_sigma)"
        )
    return TARGETS[target](alpha, sigma, d_alpha, d_sigma)


def invert_target(
    target: str, prediction: Any, x_t: Any, alpha: Any, sigma: Any, *, d_alpha: Any = None, d_sigma: Any = None
) -> tuple[Any, Any]:
    """(x0, eps) from y and x_t: x0 = (sigma y - c_eps x_t) / D, eps = (c_x x_t - alpha y) / D, D = c_x sigma - c_eps
    alpha.

    D is never 0 for v and u, nor for flow where the log-SNR falls; it is -alpha for eps and sigma for x0, which those
    targets cannot undo where alpha or sigma is 0.
    """
    c_x, c_eps = target_coefficients(target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
    size = determinant(target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
    return (sigma * prediction - c_eps * x_t) / size, (c_x * x_t - alpha * prediction) / size


def convert_target(
    prediction: Any,
    x_t: Any,
    alpha: Any,
    sigma: Any,
    *,
    source: str,
    target: str,
    d_alpha: Any = None,
    d_sigma: Any = None,
) -> Any:
    """What a prediction of ``source`` says about ``target``: y' = (D' y + (c_x c_eps' - c_eps c_x') x_t) / D.

    One expression for all pairs, with no detour over x0 and eps: a target converts to itself without an error, and
    only a ``source`` with D = 0 (eps at alpha = 0, x0 at sigma = 0) cannot be converted.
    """
    c_x, c_eps = target_coefficients(source, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
    c_x_new, c_eps_new = target_coefficients(target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
    size, size_new = (determinant(name, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma) for name in (source, target))
    return (size_new / size) * prediction + ((c_x * c_eps_new - c_eps * c_x_new) / size) * x_t


def loss_factor(source: str, target: str, alpha: Any, sigma: Any, *, d_alpha: Any = None, d_sigma: Any = None) -> Any:
    """Squared error of ``target`` over that of ``source``, for the same x0 estimate: (D_target / D_source)^2.

    So a weight w on ``source`` is the weight w / loss_factor on ``target``. From x0: 1 to x0, SNR to eps, (alpha^2 +
    sigma^2)^2 / sigma^2 to v, (alpha + sigma)^2 / sigma^2 to u.
    """
    size, size_new = (determinant(name, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma) for name in (source, target))
    return (size_new / size) ** 2


def determinant(target: str, alpha: Any, sigma: Any, *, d_alpha: Any = None, d_sigma: Any = None) -> Any:
    """D = c_x sigma - c_eps alpha: how much of ``target`` x_t does not say already."""
    c_x, c_eps = target_coefficients(target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma)
    return c_x * sigma - c_eps * alpha
