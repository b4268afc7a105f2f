"""The algebra of diffusion training: schedules, targets, weightings, and the process made of them."""

from erd_fast.diffusion.process import DiffusionProcess
from erd_fast.diffusion.schedule import SCHEDULES, Schedule, get_schedule
from erd_fast.diffusion.target import TARGETS, invert_target, resolve_target, target_coefficients
from erd_fast.diffusion.weighting import RULES, loss_weight, weight_table

__all__ = [
    "RULES",
    "SCHEDULES",
    "TARGETS",
    "DiffusionProcess",
    "Schedule",
    "get_schedule",
    "invert_target",
    "loss_weight",
    "resolve_target",
    "target_coefficients",
    "weight_table",
]
