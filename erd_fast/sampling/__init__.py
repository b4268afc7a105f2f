"""From noise to samples."""

from erd_fast.sampling.guidance import GuidanceInterval
from erd_fast.sampling.heun import heun

__all__ = ["GuidanceInterval", "heun"]
