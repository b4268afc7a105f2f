"""How training draws its timesteps, as integer tables (docs/math.md A8, docs/design.md "Randomness").

A density on the grid of K times becomes the table c_k = round(2**32 P(t <= k)); a timestep is the number of entries
that a 32-bit word reaches, so every backend draws the same one. The density that is then drawn from, exactly, is that
of the differences of the table.
"""

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from erd_fast.diffusion.schedule import Array
from erd_fast.errors import ConfigError, unknown_name

TSampler = Literal["uniform", "stratified", "logit_normal", "weight"]
_WORDS = 1 << 32


def timestep_density(
    t_sampler: str, num_timesteps: int, *, weight: Array | None = None, logit_mean: float = 0.0, logit_std: float = 1.0
) -> Array | None:
    """Probabilities of the grid times, (K,) float64 with sum 1; None is uniform.

    ``uniform`` and ``stratified`` (which spreads the times of one batch evenly): uniform. ``logit_normal``: t =
    sigmoid(logit_mean + logit_std n), n ~ N(0, 1), as mass of the K equal parts of (0, 1) (SD3, arXiv 2403.03206;
    t = 1 is noise). ``weight``: in proportion to ``weight``, for a loss that is then not weighted.

    Raises:
        ConfigError: unknown sampler, logit_std not above 0, or weights that make no density.
    """
    if t_sampler not in get_args(TSampler):
        raise ConfigError(unknown_name("t_sampler", t_sampler, get_args(TSampler)))
    if t_sampler == "weight":
        if weight is None or weight.shape != (num_timesteps,):
            raise ConfigError(f"t_sampler weight: weight: allowed a table of {num_timesteps} weights")
        return table_density(timestep_table(weight))
    if t_sampler == "logit_normal":
        if not (np.isfinite(logit_mean) and 0 < logit_std < np.inf):
            raise ConfigError(f"t_sampler logit_normal: given mean {logit_mean}, std {logit_std}, allowed std above 0")
        inner = np.arange(1, num_timesteps) / num_timesteps
        score = (np.log(inner) - np.log1p(-inner) - logit_mean) / logit_std
        below = torch.special.ndtr(torch.from_numpy(score)).numpy()
        return table_density(timestep_table(np.diff(below, prepend=0.0, append=1.0)))
    return None


def timestep_table(density: Array) -> NDArray[np.int64]:
    """c_k = round(2**32 P(t <= k)) of numbers >= 0 in proportion to the density: (K,) int64, not falling, last 2**32.

    Raises:
        ConfigError: a negative or not finite number, or none above 0.
    """
    density = np.asarray(density, dtype=np.float64)
    with np.errstate(over="ignore"):
        total = density.sum()
    if not (density.ndim == 1 and (density >= 0).all() and 0 < total < np.inf):
        raise ConfigError("timestep density: allowed a row of finite numbers >= 0, at least one of them above 0")
    below = np.cumsum(density)
    return np.rint(below / below[-1] * _WORDS).astype(np.int64)


def table_density(table: NDArray[np.int64]) -> Array:
    """The probabilities that :func:`timestep_table` gives its times, (K,) float64."""
    return np.diff(table, prepend=0) / _WORDS
