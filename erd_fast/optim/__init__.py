"""The optimizer."""

from erd_fast.optim.adamw_ema import AdamWEMA

__all__ = ["AdamWEMA"]
