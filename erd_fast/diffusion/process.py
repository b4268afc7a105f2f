"""The diffusion process of one training run: schedule, target, weighting and timestep sampler as tables on the device,
and the ops on them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from erd_fast.diffusion.schedule import Array, Schedule
from erd_fast.diffusion.target import resolve_target, target_coefficients
from erd_fast.diffusion.timesteps import timestep_density, timestep_table
from erd_fast.diffusion.weighting import Normalize, Reading, weight_table
from erd_fast.errors import ConfigError
from erd_fast.ops import DiffusionLoss, Draw, QSample, diffusion_loss, draw, q_sample


class DiffusionProcess:
    """Tables built in float64 and kept in float32, indexed by the timestep index; no host work in a step.

    With ``t_sampler="weight"`` timesteps are drawn in proportion to the weight, and the weight of the loss is its mean:
    the same expected gradient as weighting uniform timesteps, with another variance.

    Args:
        schedule: the noise schedule.
        target: name or alias of what the model predicts.
        weighting, normalize, gamma, k, reading, clip_max, importance_correct: the loss weight, as in
            :func:`erd_fast.weight_table`.
        t_sampler, logit_mean, logit_std: how timesteps are drawn, as in
            :func:`erd_fast.diffusion.timesteps.timestep_density`.
        device: where the tables live.

    Attributes:
        density: (K,) float64 probability of each grid time under the sampler; None is uniform.

    Raises:
        ConfigError: as those functions do.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: str = "eps",
        weighting: str = "erd",
        normalize: Normalize = "mean",
        *,
        gamma: float | None = None,
        k: float = 1.0,
        reading: Reading = "t",
        clip_max: float | None = None,
        importance_correct: bool = False,
        t_sampler: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        device: torch.device | str = "cpu",
    ):
        self.schedule = schedule
        self.target = resolve_target(target, schedule)
        slopes = {"d_alpha": schedule.d_alpha, "d_sigma": schedule.d_sigma}
        c_x, c_eps = target_coefficients(self.target, schedule.alpha, schedule.sigma, **slopes)
        rows = np.stack((schedule.alpha, schedule.sigma, c_x, c_eps), axis=1)

        def weights(density: Array | None) -> Array:
            return weight_table(
                weighting,
                self.target,
                schedule,
                normalize,
                reading,
                clip_max,
                gamma=gamma,
                k=k,
                density=density,
                importance_correct=importance_correct,
            )

        if t_sampler == "weight":
            if importance_correct:
                raise ConfigError("importance_correct: given True with t_sampler weight, which is the weighting itself")
            wanted = weights(None)
            self.density = timestep_density(t_sampler, len(schedule), weight=wanted)
            weight = np.full(len(schedule), wanted.mean())
        else:
            self.density = timestep_density(t_sampler, len(schedule), logit_mean=logit_mean, logit_std=logit_std)
            weight = weights(self.density)
        self.coefficients = _table(rows, device)
        self.weight = _table(weight, device)
        self.time = _table(schedule.time, device)
        self._stratified = t_sampler == "stratified"
        # On the host too: readers ask there which samples to fetch ahead.
        self._host_timesteps = None if self.density is None else torch.from_numpy(timestep_table(self.density))
        self._timesteps = None if self._host_timesteps is None else self._host_timesteps.to(device)

    def draw(self, counter: Tensor, *, global_batch: int, **how: Any) -> Draw:
        """:func:`erd_fast.ops.draw` with this process's timestep sampler; ``global_batch`` images are one step."""
        return draw(
            counter,
            num_timesteps=len(self.schedule),
            t_table=self._host_timesteps if counter.device.type == "cpu" else self._timesteps,
            strata=global_batch if self._stratified else 0,
            **how,
        )

    def q_sample(self, latents: Tensor, t_index: Tensor, **how: Any) -> QSample:
        """:func:`erd_fast.ops.q_sample` with this process's coefficients."""
        return q_sample(latents, self.coefficients, t_index, **how)

    def loss(self, prediction: Tensor, target: Tensor, t_index: Tensor, **how: Any) -> DiffusionLoss:
        """:func:`erd_fast.ops.diffusion_loss` with this process's weights."""
        return diffusion_loss(prediction, target, self.weight, t_index, **how)


def _table(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)
