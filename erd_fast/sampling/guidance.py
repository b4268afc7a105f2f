"""Classifier-free guidance, and the noise levels where it acts (docs/math.md G)."""

import dataclasses
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from erd_fast.errors import ConfigError

GuidanceUnit = Literal["frac", "t", "sigma", "step"]


@dataclasses.dataclass(frozen=True)
class GuidanceInterval:
    """Where guidance acts; elsewhere the conditional prediction stands alone and the null half is not computed.

    Published code uses different conventions, so the unit is part of the interval:

    - ``frac``: lo <= t / T < hi, fraction of the training time (the ERD paper's [0, 0.8]);
    - ``t``: lo <= t < hi, in the model's own time (index 0 ... T - 1, or (0, 1) on continuous schedules);
    - ``sigma``: lo <= sigma / alpha <= hi (EDM's sigma);
    - ``step``: lo <= i <= hi, number of the sampler step that the evaluation belongs to, counted from the noise.
    """

    lo: float
    hi: float
    unit: GuidanceUnit = "frac"

    def __post_init__(self) -> None:
        if self.unit not in get_args(GuidanceUnit):
            raise ConfigError(f"guidance unit: given {self.unit!r}, allowed {', '.join(get_args(GuidanceUnit))}")
        if not self.lo <= self.hi:
            raise ConfigError(f"guidance interval: given {self.lo} to {self.hi}, allowed lo <= hi")

    def holds(self, *, time: float, total: float, sigma: float, step: int) -> bool:
        """Whether an evaluation at model time ``time`` of ``total``, EDM noise level ``sigma``, in ``step``, is
        guided."""
        if self.unit == "frac":
            return self.lo * total <= time < self.hi * total
        if self.unit == "t":
            return self.lo <= time < self.hi
        return self.lo <= (sigma if self.unit == "sigma" else step) <= self.hi


def guided(model: Any, x: Tensor, t: Tensor, labels: Tensor, cfg_scale: float) -> Tensor:
    """y = y_null + cfg_scale (y_label - y_null) on all channels, from one pass over both halves; 1 needs no null
    half."""
    if cfg_scale == 1.0:
        return model(x, t, labels)
    null = torch.full_like(labels, model.num_classes)
    both = model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((labels, null)))
    conditional, unconditional = both.chunk(2)
    return unconditional + cfg_scale * (conditional - unconditional)
