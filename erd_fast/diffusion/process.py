"""The diffusion process of one training run: schedule, target and weighting as tables on the device, and the ops on
them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from erd_fast.diffusion.schedule import Schedule
from erd_fast.diffusion.target import resolve_target, target_coefficients
from erd_fast.diffusion.weighting import Normalize, weight_table
from erd_fast.ops import DiffusionLoss, QSample, diffusion_loss, q_sample


class DiffusionProcess:
    """Tables built in float64 and kept in float32, indexed by the timestep index; no host work in a step.

    Args:
        schedule: the noise schedule.
        target: name or alias of what the model predicts.
        weighting: loss weighting rule.
        normalize: its normalisation.
        device: where the tables live.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: str = "eps",
        weighting: str = "erd",
        normalize: Normalize = "mean",
        device: torch.device | str = "cpu",
    ):
        self.schedule = schedule
        self.target = resolve_target(target, schedule)
        c_x, c_eps = target_coefficients(self.target, schedule.alpha, schedule.sigma)
        rows = np.stack((schedule.alpha, schedule.sigma, c_x, c_eps), axis=1)
        self.coefficients = _table(rows, device)
        self.weight = _table(weight_table(weighting, self.target, schedule, normalize), device)
        self.time = _table(schedule.time, device)

    def q_sample(self, latents: Tensor, t_index: Tensor, **how: Any) -> QSample:
        """:func:`erd_fast.ops.q_sample` with this process's coefficients."""
        return q_sample(latents, self.coefficients, t_index, **how)

    def loss(self, prediction: Tensor, target: Tensor, t_index: Tensor, **how: Any) -> DiffusionLoss:
        """:func:`erd_fast.ops.diffusion_loss` with this process's weights."""
        return diffusion_loss(prediction, target, self.weight, t_index, **how)


def _table(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device)
