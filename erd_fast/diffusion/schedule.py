"""Noise schedules: alpha and sigma of x_t = alpha x0 + sigma eps, in float64 (docs/math.md A).

A schedule is a grid of times. Discrete schedules have T training steps and feed the step's index to the model;
continuous ones have 65,536 grid times t = (k + 1/2) / 65536 in (0, 1) and feed t. t grows with the noise in all of
them. Derivatives are with respect to t in [0, 1], on discrete schedules too.
"""

import abc
from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.errors import ConfigError, unknown_name

Array = NDArray[np.float64]
CONTINUOUS_GRID = 65_536


class Schedule(abc.ABC):
    """alpha(t) and sigma(t) on a grid of K times.

    Attributes:
        name: name in :data:`SCHEDULES`.
        discrete: True if the model is given the index k, False if it is given t in (0, 1).
        variance_preserving: True if alpha^2 + sigma^2 = 1.
        time: (K,) float64, what the model is given at each grid point.
        alpha, sigma: (K,) float64 on the grid.
        d_alpha, d_sigma: (K,) float64, their derivatives by t in [0, 1].
    """

    name: str
    discrete: bool
    variance_preserving: bool
    time: Array
    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array

    def __len__(self) -> int:
        return len(self.time)

    @property
    def log_snr(self) -> Array:
        """lambda = ln(alpha^2 / sigma^2) on the grid, (K,) float64; -inf where alpha is 0."""
        with np.errstate(divide="ignore"):
            return 2.0 * (np.log(self.alpha) - np.log(self.sigma))

    @property
    def ratio(self) -> Array:
        """sigma / alpha on the grid, (K,) float64; inf where alpha is 0."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    @abc.abstractmethod
    def d_log_snr(self) -> Array:
        """d lambda / dt on the grid, (K,) float64, negative."""

    @overload
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def alpha_sigma(self, t: Array | float) -> tuple[Array, Array]: ...
    @abc.abstractmethod
    def alpha_sigma(self, t: Tensor | Array | float) -> tuple[Tensor, Tensor] | tuple[Array, Array]:
        """(alpha, sigma) in float64 at times as the model is given them: indices if discrete, else t in [0, 1].

        Tensors give tensors on their device; numbers and arrays give arrays. Raises ValueError outside the range.
        """

    @overload
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def derivatives(self, t: Array | float) -> tuple[Array, Array]: ...
    @abc.abstractmethod
    def derivatives(self, t: Tensor | Array | float) -> tuple[Tensor, Tensor] | tuple[Array, Array]:
        """(d_alpha, d_sigma) at times as in :meth:`alpha_sigma`."""

    @abc.abstractmethod
    def time_at(self, ratio: Array) -> Array:
        """The model time whose sigma / alpha is ``ratio``; discrete schedules take the nearest index. Float64."""


class DiscreteSchedule(Schedule):
    """T training steps with tables of alpha and sigma; sigma is sqrt(1 - alpha^2) unless given.

    Derivatives are central differences of the tables, one step being 1/T.

    Raises:
        ConfigError: a table is no row of at least two finite numbers >= 0, or alpha / sigma does not fall strictly.
    """

    discrete = True

    def __init__(self, name: str, alpha: Array, sigma: Array | None = None):
        self.name = name
        self.alpha = _table(name, "alpha", alpha)
        if sigma is None and self.alpha.max() > 1.0:
            raise ConfigError(
                f"schedule {name}: alpha: given {self.alpha.max()}, allowed 0 to 1 where sigma is not given"
            )
        self.sigma = np.sqrt(1.0 - self.alpha**2) if sigma is None else _table(name, "sigma", sigma)
        if self.sigma.shape != self.alpha.shape:
            raise ConfigError(f"schedule {name}: sigma: given {len(self.sigma)} values, allowed {len(self.alpha)}")
        self.variance_preserving = bool(np.allclose(self.alpha**2 + self.sigma**2, 1.0, rtol=0, atol=1e-12))
        falls = self.alpha[:-1] * self.sigma[1:] > self.alpha[1:] * self.sigma[:-1]
        if not falls.all():
            step = int(np.flatnonzero(~falls)[0]) + 1
            raise ConfigError(
                f"schedule {name}: alpha / sigma: given a table that does not fall at step {step}; "
                "allowed strictly falling ones: t grows with the noise"
            )
        self.time = np.arange(len(self.alpha), dtype=np.float64)
        self.d_alpha, self.d_sigma = self._difference(self.alpha), self._difference(self.sigma)

    @property
    def d_log_snr(self) -> Array:
        return self._difference(self.log_snr)

    def _difference(self, table: Array) -> Array:
        return np.gradient(table, 1.0 / len(self.alpha))

    def alpha_sigma(self, t):  # type: ignore[no-untyped-def]  # the overloads of the base class
        return self._rows(t, self.alpha, self.sigma)

    def derivatives(self, t):  # type: ignore[no-untyped-def]  # the overloads of the base class
        return self._rows(t, self.d_alpha, self.d_sigma)

    def _rows(self, t: Any, *tables: Array) -> tuple[Any, ...]:
        if not isinstance(t, Tensor):
            return tuple(rows.numpy() for rows in self._rows(torch.as_tensor(t), *tables))
        index = t.long()
        if (index != t).any() or (index < 0).any() or (index >= len(self)).any():
            raise ValueError(f"schedule {self.name}: t: allowed whole numbers from 0 to {len(self) - 1}")
        return tuple(torch.as_tensor(table, device=t.device)[index] for table in tables)

    def time_at(self, ratio: Array) -> Array:
        # Not a step without noise or without signal: no sampler can start or go on there.
        usable = (self.ratio > 0) & np.isfinite(self.ratio)
        grid = np.where(usable, self.ratio, 0.0)
        distance = np.where(usable, np.abs(np.asarray(ratio)[..., None] - grid), np.inf)
        return np.argmin(distance, axis=-1).astype(np.float64)


class ContinuousSchedule(Schedule):
    """Closed forms in t on [0, 1].

    A subclass gives ``name``, ``variance_preserving``, and the formulas ``_path`` and ``_slope`` with operations of
    ``xp``, which is NumPy or PyTorch, as ``t`` is an array or a tensor.
    """

    discrete = False

    def __init__(self) -> None:
        self.time = (np.arange(CONTINUOUS_GRID) + 0.5) / CONTINUOUS_GRID
        self.alpha, self.sigma = self.alpha_sigma(self.time)
        self.d_alpha, self.d_sigma = self.derivatives(self.time)

    @abc.abstractmethod
    def _path(self, t: Any, xp: Any) -> tuple[Any, Any]:
        """(alpha, sigma)."""

    @abc.abstractmethod
    def _slope(self, t: Any, xp: Any) -> tuple[Any, Any]:
        """(d alpha / dt, d sigma / dt)."""

    @property
    def d_log_snr(self) -> Array:
        return 2.0 * (self.d_alpha / self.alpha - self.d_sigma / self.sigma)

    def alpha_sigma(self, t):  # type: ignore[no-untyped-def]  # the overloads of the base class
        return self._path(*self._checked(t))

    def derivatives(self, t):  # type: ignore[no-untyped-def]  # the overloads of the base class
        return self._slope(*self._checked(t))

    def _checked(self, t: Any) -> tuple[Any, Any]:
        t, xp = (t.double(), torch) if isinstance(t, Tensor) else (np.asarray(t, dtype=np.float64), np)
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"schedule {self.name}: t: allowed 0 to 1")
        return t, xp


class _Flow(ContinuousSchedule):
    """Linear path of flow matching (arXiv 2210.02747): alpha = 1 - t, sigma = t. t = 0 is data, as in the ERD paper."""

    name, variance_preserving = "flow", False

    def _path(self, t: Any, xp: Any) -> tuple[Any, Any]:
        return 1.0 - t, 1.0 * t

    def _slope(self, t: Any, xp: Any) -> tuple[Any, Any]:
        return 0.0 * t - 1.0, 0.0 * t + 1.0

    def time_at(self, ratio: Array) -> Array:
        ratio = np.asarray(ratio, dtype=np.float64)
        return ratio / (1.0 + ratio)


class _VP(ContinuousSchedule):
    """Variance-preserving SDE (arXiv 2011.13456): beta(t) from 0.1 to 20, log alpha = -1/2 integral of beta."""

    name, variance_preserving = "vp", True
    _BETA_MIN, _BETA_MAX = 0.1, 20.0

    def _log_alpha_squared(self, t: Any) -> Any:
        return -0.5 * (self._BETA_MAX - self._BETA_MIN) * t**2 - self._BETA_MIN * t

    def _path(self, t: Any, xp: Any) -> tuple[Any, Any]:
        log_square = self._log_alpha_squared(t)
        return xp.exp(0.5 * log_square), xp.sqrt(-xp.expm1(log_square))

    def _slope(self, t: Any, xp: Any) -> tuple[Any, Any]:
        alpha, sigma = self._path(t, xp)
        beta = self._BETA_MIN + (self._BETA_MAX - self._BETA_MIN) * t
        with np.errstate(divide="ignore"):  # sigma leaves 0 vertically
            return -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma

    def time_at(self, ratio: Array) -> Array:
        slope, half = self._BETA_MAX - self._BETA_MIN, 0.5 * self._BETA_MIN
        # slope/4 t^2 + half t = c; the form of the root that does not cancel at small t.
        c = 0.5 * np.log1p(np.asarray(ratio, dtype=np.float64) ** 2)
        return 2.0 * c / (half + np.sqrt(half**2 + slope * c))


class _GVP(ContinuousSchedule):
    """Trigonometric path (SiT, arXiv 2401.08740): alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name, variance_preserving = "gvp", True

    def _path(self, t: Any, xp: Any) -> tuple[Any, Any]:
        return xp.cos(0.5 * np.pi * t), xp.sin(0.5 * np.pi * t)

    def _slope(self, t: Any, xp: Any) -> tuple[Any, Any]:
        return -0.5 * np.pi * xp.sin(0.5 * np.pi * t), 0.5 * np.pi * xp.cos(0.5 * np.pi * t)

    def time_at(self, ratio: Array) -> Array:
        return np.arctan(np.asarray(ratio, dtype=np.float64)) * (2.0 / np.pi)


_LOG_SNR_END = 10.0  # of the two schedules whose log SNR is linear in t: from +10 to -10


class _LogSnrFlow(ContinuousSchedule):
    """alpha = sigmoid(lambda / 2), sigma = sigmoid(-lambda / 2), lambda = 10 - 20 t: the flow path in another time."""

    name, variance_preserving = "logsnr_flow", False

    def _path(self, t: Any, xp: Any) -> tuple[Any, Any]:
        half = _LOG_SNR_END * (0.5 - t)
        return 1.0 / (1.0 + xp.exp(-half)), 1.0 / (1.0 + xp.exp(half))

    def _slope(self, t: Any, xp: Any) -> tuple[Any, Any]:
        alpha, sigma = self._path(t, xp)
        rate = _LOG_SNR_END * alpha * sigma
        return -rate, rate

    def time_at(self, ratio: Array) -> Array:
        """Beyond the path's ends, the end."""
        with np.errstate(divide="ignore"):
            half = np.log(np.asarray(ratio, dtype=np.float64))
        return np.clip(0.5 + half / _LOG_SNR_END, 0.0, 1.0)


def _cosine(num_steps: int) -> Schedule:
    """IDDPM's cosine schedule (Nichol & Dhariwal, arXiv 2102.09672, Eq. 17), offset s = 0.008, beta at most 0.999."""
    edges = np.arange(num_steps + 1) / num_steps
    f = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1.0 - f[1:] / f[:-1], 0.999)
    return DiscreteSchedule("cosine", np.sqrt(np.cumprod(1.0 - beta)))


def _ddpm_linear(num_steps: int) -> Schedule:
    """DDPM's betas (Ho et al., arXiv 2006.11239): num_steps of them, evenly from 1e-4 to 0.02."""
    beta = np.linspace(1e-4, 0.02, num_steps)
    return DiscreteSchedule("ddpm_linear", np.sqrt(np.cumprod(1.0 - beta)))


def _logsnr(num_steps: int) -> Schedule:
    """alpha^2 = sigmoid(lambda), lambda = 10 - 20 (i + 1) / T: exactly linear in the step."""
    log_snr = _LOG_SNR_END * (1.0 - 2.0 * np.arange(1, num_steps + 1) / num_steps)
    alpha, sigma = 1.0 / np.sqrt(1.0 + np.exp(-log_snr)), 1.0 / np.sqrt(1.0 + np.exp(log_snr))
    return DiscreteSchedule("logsnr", alpha, sigma)


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "cosine": _cosine,
    "ddpm_linear": _ddpm_linear,
    "flow": lambda num_steps: _Flow(),
    "vp": lambda num_steps: _VP(),
    "gvp": lambda num_steps: _GVP(),
    "logsnr": _logsnr,
    "logsnr_flow": lambda num_steps: _LogSnrFlow(),
}


def get_schedule(name: str, num_steps: int = 1000) -> Schedule:
    """The schedule called ``name`` (a key of :data:`SCHEDULES`).

    Args:
        num_steps: T of a discrete schedule; continuous ones always have 65,536 grid times.

    Raises:
        ConfigError: unknown name, or num_steps < 2.
    """
    if name not in SCHEDULES:
        raise ConfigError(unknown_name("schedule", name, SCHEDULES))
    if num_steps < 2:
        raise ConfigError(f"num_steps: given {num_steps}, allowed 2 or more")
    return SCHEDULES[name](num_steps)


def _table(name: str, field: str, values: Any) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or len(table) < 2:
        raise ConfigError(f"schedule {name}: {field}: given shape {table.shape}, allowed (T,) with T of 2 or more")
    wrong = ~(np.isfinite(table) & (table >= 0))
    if wrong.any():
        step = int(np.flatnonzero(wrong)[0])
        raise ConfigError(f"schedule {name}: {field}: given {table[step]} at step {step}, allowed finite numbers >= 0")
    return table
