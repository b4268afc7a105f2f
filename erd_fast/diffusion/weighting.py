"""Loss weights w(t): one number of a rule, and its table on a schedule's grid (docs/math.md C, D)."""

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from erd_fast.diffusion.rules import RULES, Rule, Terms
from erd_fast.diffusion.schedule import Array, Schedule
from erd_fast.diffusion.target import determinant, resolve_target
from erd_fast.errors import ConfigError, unknown_name

Normalize = Literal["mean", "none", "max"]
Reading = Literal["t", "log_snr"]


def loss_weight(
    rule: str,
    target: str,
    alpha: Any,
    sigma: Any,
    *,
    gamma: float | None = None,
    k: float = 1.0,
    d_alpha: Any = None,
    d_sigma: Any = None,
    normalizer: float = 1.0,
) -> Any:
    """w = rule(target, alpha, sigma) / normalizer: the factor of the squared error of ``target`` at one noise level.

    ``erd``: sqrt((c_x alpha)^2 + (c_eps sigma)^2), with (c_x, c_eps) of the target: alpha for x0, sigma for eps,
    sqrt(2) alpha sigma for v, sqrt(alpha^2 + sigma^2) for u. The others are listed in :data:`RULES`; for a target
    that a rule was not published for, the weight is carried over from its form on x0 or eps (:func:`is_derived`). The
    published v forms of min_snr, soft_min_snr and p2 are the same objective where the variance is preserved; that of
    debias is another one. Where alpha is 0, a rule that divides by the SNR gives 1. Computed in float64.

    Args:
        alpha, sigma: >= 0 and not both 0; floats, NumPy arrays or tensors. Values on a GPU are not read back to check.
        gamma: parameter of min_snr, max_snr, soft_min_snr (5) and p2 (1); others ignore it.
        k: parameter of p2.
        d_alpha, d_sigma: derivatives by t, for target ``flow`` and the rules ``sit_velocity`` and ``sit_likelihood``.
        normalizer: Z, such as the mean of the bare weight.

    Returns:
        A float, array or tensor as ``alpha`` is; tensors keep dtype (at least float32) and device.

    Raises:
        ConfigError: unknown rule or target, gamma or k or normalizer not above 0, derivatives missing, or alpha or
            sigma negative or NaN.
    """
    given, target = _rule(rule), resolve_target(target)
    gamma = check_positive("gamma", gamma if gamma is not None else given.gamma or 1.0)
    k, normalizer = check_positive("k", k), check_positive("normalizer", normalizer)
    if given.needs_derivatives and (d_alpha is None or d_sigma is None):
        raise ConfigError(
            f"weighting {rule}: d_alpha, d_sigma: not given, allowed the derivatives of alpha and sigma by t"
        )
    if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
        like = alpha if isinstance(alpha, Tensor) else sigma
        dtype = torch.promote_types(like.dtype, torch.float32)
        tensors = [_as_tensor(value, like) for value in (alpha, sigma, d_alpha, d_sigma)]
        return _weight(given, target, torch, tensors, gamma, k, like.device.type == "cpu").div(normalizer).to(dtype)
    arrays = [None if value is None else np.asarray(value, np.float64) for value in (alpha, sigma, d_alpha, d_sigma)]
    with np.errstate(all="ignore"):
        weight = _weight(given, target, np, arrays, gamma, k, check=True) / normalizer
    return float(weight) if np.ndim(weight) == 0 and not isinstance(alpha, np.ndarray) else weight


def is_derived(rule: str, target: str) -> bool:
    """Whether ``rule`` has no published form for ``target``, so that its weight is carried over (docs/math.md B2)."""
    return resolve_target(target) not in _rule(rule).published


def weight_table(
    rule: str,
    target: str,
    schedule: Schedule,
    normalize: Normalize = "mean",
    reading: Reading = "t",
    clip_max: float | None = None,
    *,
    gamma: float | None = None,
    k: float = 1.0,
    density: Array | None = None,
    importance_correct: bool = False,
) -> Array:
    """w on the schedule's grid, (K,) float64.

    ``reading`` is of the ERD paper's Remark E.2, for any rule: ``t`` takes the rule as the weight over t, as the
    paper's experiments do; ``log_snr`` takes it as the wanted effort over lambda = ln SNR, so w = rule |d lambda / dt|
    / (K p). They agree where lambda is linear in t and t is uniform.

    ``normalize``: ``mean`` divides by Z = sum of p w, so that the average loss scale stays (ERD paper, section 4);
    ``max`` divides by the largest; ``none`` leaves w as it is.

    Args:
        clip_max: no weight of the result is larger. With ``mean``, the weights below it grow by one factor so that
            their mean stays 1; it must then be 1 or more.
        gamma, k: as in :func:`loss_weight`.
        density: p, (K,) probability of each grid time; None is uniform. Times of probability 0 have weight 0.
        importance_correct: divide by K p: the objective of uniform t, whatever the density. ``log_snr`` does so anyway.

    Raises:
        ConfigError: unknown names, a parameter outside its range, or a weight that is not finite on this schedule.
    """
    if normalize not in get_args(Normalize):
        raise ConfigError(unknown_name("normalize", normalize, get_args(Normalize)))
    if reading not in get_args(Reading):
        raise ConfigError(unknown_name("reading", reading, get_args(Reading)))
    slopes: dict[str, Any] = {"d_alpha": schedule.d_alpha, "d_sigma": schedule.d_sigma}
    table = loss_weight(rule, target, schedule.alpha, schedule.sigma, gamma=gamma, k=k, **slopes)
    p = _checked_density(density, len(schedule))
    if reading == "log_snr":
        with np.errstate(invalid="ignore"):  # refused below
            table = table * np.abs(schedule.d_log_snr)
    if reading == "log_snr" or importance_correct:
        table = table / np.where(p > 0, p * len(p), np.inf)
    if density is not None:
        table = np.where(p > 0, table, 0.0)
    if not np.isfinite(table).all():
        at = int(np.flatnonzero(~np.isfinite(table))[0])
        raise ConfigError(
            f"weighting {rule} of target {target}, reading {reading}: given {table[at]} at index {at} of schedule "
            f"{schedule.name} (alpha {schedule.alpha[at]}, sigma {schedule.sigma[at]}); allowed finite weights"
        )
    mean = _mean(table, p)
    with np.errstate(divide="ignore", over="ignore"):
        usable = normalize == "none" or np.isfinite(1.0 / np.float64(mean))
    if not usable:
        raise ConfigError(
            f"weighting {rule} of target {target} with gamma {gamma}, k {k} on schedule {schedule.name}: given weights "
            f"with mean {mean:g}, allowed a mean that can be divided by"
        )
    return _normalized(table, p, normalize, clip_max)


def check_positive(field: str, value: float) -> float:
    """``value``, a finite number above 0. Raises ConfigError otherwise."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{field}: given {value}, allowed numbers above 0")
    return value


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise ConfigError(unknown_name("weighting", name, RULES))
    return RULES[name]


def _as_tensor(value: Any, like: Tensor) -> Tensor | None:
    return None if value is None else torch.as_tensor(value, dtype=torch.float64, device=like.device)


def _weight(rule: Rule, target: str, xp: Any, values: list[Any], gamma: float, k: float, check: bool) -> Any:
    alpha, sigma, d_alpha, d_sigma = values
    if check and not (xp is torch and _traced()):
        _check_terms("alpha", alpha, xp)
        _check_terms("sigma", sigma, xp)
        _check("alpha, sigma", "0 and 0", (alpha + sigma > 0).all(), "one of them above 0")
    terms = Terms(alpha, sigma, d_alpha, d_sigma, gamma, k, xp.maximum)
    if target in rule.published:
        weight = rule.published[target](terms)
    else:
        assert rule.invariant is not None
        weight = rule.invariant(terms) / determinant(target, alpha, sigma, d_alpha=d_alpha, d_sigma=d_sigma) ** 2
    undefined = ~xp.isfinite(weight) & (alpha**2 == 0)
    return xp.where(undefined, xp.ones_like(weight), weight)


def _traced() -> bool:
    """Within torch.compile or a functorch transform, where values cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _check_terms(field: str, values: Any, xp: Any) -> None:
    wrong = ~((values >= 0) & xp.isfinite(values))
    if wrong.any():
        at = int(np.flatnonzero(np.asarray(wrong))[0])
        where = f" at index {at}" if values.ndim else ""
        raise ConfigError(f"{field}: given {float(values.reshape(-1)[at])}{where}, allowed finite numbers >= 0")


def _check(field: str, given: Any, right: Any, allowed: str) -> None:
    if not right:
        raise ConfigError(f"{field}: given {given}, allowed {allowed}")


def _checked_density(density: Array | None, size: int) -> Array:
    if density is None:
        return np.full(size, 1.0 / size)
    p = np.asarray(density, dtype=np.float64)
    right = p.shape == (size,) and bool((p >= 0).all()) and abs(p.sum() - 1.0) < 1e-6
    _check("density", f"shape {p.shape} with sum {p.sum()}", right, f"{size} probabilities with sum 1")
    return p


def _normalized(table: Array, p: Array, normalize: Normalize, clip_max: float | None) -> Array:
    if clip_max is not None:
        check_positive("clip_max", clip_max)
    if normalize == "mean":
        return _with_mean_one(table, p, clip_max)
    scaled = table / table.max() if normalize == "max" else table
    return scaled if clip_max is None else np.minimum(scaled, clip_max)


def _mean(table: Array, p: Array) -> float:
    """Mean under p, by pairwise sums: a constant table keeps its value to the last bits."""
    uniform = (p == p[0]).all()
    return float(table.mean() if uniform else (p * table).sum())


def _with_mean_one(table: Array, p: Array, clip_max: float | None) -> Array:
    """min(c table, clip_max) with the c that makes the mean under p 1."""
    scale = 1.0 / _mean(table, p)
    if clip_max is None:
        return table * scale
    reached = clip_max * p[table > 0].sum() >= 1.0 - 1e-9
    _check("clip_max", clip_max, reached, "1 or more, and more where some weights are 0, or the mean cannot be 1")
    capped = table * scale > clip_max
    while True:  # each round caps more: at most as many rounds as there are times, in practice a handful
        rest = float((p[~capped] * table[~capped]).sum())
        scale = (1.0 - clip_max * float(p[capped].sum())) / rest if rest > 0 else 1.0
        more = capped | (table * scale > clip_max)
        if (more == capped).all():
            return np.where(capped, clip_max, table * scale)
        capped = more
