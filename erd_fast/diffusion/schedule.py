"""Noise schedules: alpha and sigma of x_t = alpha x0 + sigma eps, in float64 (docs/math.md A).

A schedule is a grid of times. Discrete schedules have T training steps and feed the step's index to the model;
continuous ones have 65,536 grid times t = (k + 1/2) / 65536 in (0, 1) and feed t. t grows with the noise in all of
them.
"""

import abc
from collections.abc import Callable
from typing import overload

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
    """

    def __init__(
        self, name: str, *, discrete: bool, variance_preserving: bool, time: Array, alpha: Array, sigma: Array
    ):
        self.name = name
        self.discrete = discrete
        self.variance_preserving = variance_preserving
        self.time, self.alpha, self.sigma = time, alpha, sigma

    def __len__(self) -> int:
        return len(self.time)

    @property
    def log_snr(self) -> Array:
        """lambda = ln(alpha^2 / sigma^2) on the grid, (K,) float64."""
        return 2.0 * (np.log(self.alpha) - np.log(self.sigma))

    @overload
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def alpha_sigma(self, t: Array | float) -> tuple[Array, Array]: ...
    @abc.abstractmethod
    def alpha_sigma(self, t: Tensor | Array | float) -> tuple[Tensor, Tensor] | tuple[Array, Array]:
        """(alpha, sigma) in float64 at times as the model is given them: indices if discrete, else t in [0, 1].

        Tensors give tensors on their device; numbers and arrays give arrays. Raises ValueError outside the range.
        """

    @abc.abstractmethod
    def time_at(self, ratio: Array) -> Array:
        """The model time whose sigma / alpha is ``ratio``; discrete schedules take the nearest index. Float64."""


class DiscreteSchedule(Schedule):
    """T training steps with a table of alpha."""

    def __init__(self, name: str, alpha: Array):
        time = np.arange(len(alpha), dtype=np.float64)
        sigma = np.sqrt(1.0 - alpha**2)
        super().__init__(name, discrete=True, variance_preserving=True, time=time, alpha=alpha, sigma=sigma)

    def alpha_sigma(self, t):  # type: ignore[no-untyped-def]  # the overloads of the base class
        if isinstance(t, Tensor):
            index = t.long()
            if (index != t).any() or (index < 0).any() or (index >= len(self)).any():
                raise ValueError(f"schedule {self.name}: t: allowed whole numbers from 0 to {len(self) - 1}")
            return tuple(torch.as_tensor(table, device=t.device)[index] for table in (self.alpha, self.sigma))
        alpha, sigma = self.alpha_sigma(torch.as_tensor(t))
        return alpha.numpy(), sigma.numpy()

    def time_at(self, ratio: Array) -> Array:
        distance = np.abs(np.asarray(ratio)[..., None] - self.sigma / self.alpha)
        return np.argmin(distance, axis=-1).astype(np.float64)


class ContinuousSchedule(Schedule):
    """Closed forms in t on [0, 1].

    Args:
        formula: t -> (alpha, sigma) with operations that NumPy arrays and tensors share.
        time_of_ratio: sigma / alpha -> t, the inverse of the formula.
    """

    def __init__(
        self,
        name: str,
        formula: Callable[[Array], tuple[Array, Array]],
        time_of_ratio: Callable[[Array], Array],
        *,
        variance_preserving: bool,
    ):
        self._formula, self._time_of_ratio = formula, time_of_ratio
        time = (np.arange(CONTINUOUS_GRID) + 0.5) / CONTINUOUS_GRID
        alpha, sigma = formula(time)
        super().__init__(
            name, discrete=False, variance_preserving=variance_preserving, time=time, alpha=alpha, sigma=sigma
        )

    def alpha_sigma(self, t):  # type: ignore[no-untyped-def]  # the overloads of the base class
        t = t.double() if isinstance(t, Tensor) else np.asarray(t, dtype=np.float64)
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"schedule {self.name}: t: allowed 0 to 1")
        return self._formula(t)

    def time_at(self, ratio: Array) -> Array:
        return self._time_of_ratio(np.asarray(ratio, dtype=np.float64))


def _cosine(num_steps: int) -> Schedule:
    """IDDPM's cosine schedule (Nichol & Dhariwal, arXiv 2102.09672, Eq. 17), offset s = 0.008, beta at most 0.999."""
    edges = np.arange(num_steps + 1) / num_steps
    f = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1.0 - f[1:] / f[:-1], 0.999)
    return DiscreteSchedule("cosine", np.sqrt(np.cumprod(1.0 - beta)))


def _flow(num_steps: int) -> Schedule:
    """Linear path of flow matching (arXiv 2210.02747): alpha = 1 - t, sigma = t. t = 0 is data, as in the ERD paper."""
    return ContinuousSchedule(
        "flow", lambda t: (1.0 - t, 1.0 * t), lambda ratio: ratio / (1.0 + ratio), variance_preserving=False
    )


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"cosine": _cosine, "flow": _flow}


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
