"""The algebra of diffusion training: schedules, targets, weightings, timestep samplers, and their process."""

from erd_fast.diffusion.process import DiffusionProcess
from erd_fast.diffusion.rules import RULES
from erd_fast.diffusion.schedule import SCHEDULES, ContinuousSchedule, DiscreteSchedule, Schedule, get_schedule
from erd_fast.diffusion.target import (
    ALIASES,
    TARGETS,
    convert_target,
    determinant,
    invert_target,
    loss_factor,
    resolve_target,
    target_coefficients,
)
from erd_fast.diffusion.timesteps import table_density, timestep_density, timestep_table
from erd_fast.diffusion.weighting import is_derived, loss_weight, weight_table

__all__ = [
    "ALIASES",
    "RULES",
    "SCHEDULES",
    "TARGETS",
    "ContinuousSchedule",
    "DiffusionProcess",
    "DiscreteSchedule",
    "Schedule",
    "convert_target",
    "determinant",
    "get_schedule",
    "invert_target",
    "is_derived",
    "loss_factor",
    "loss_weight",
    "resolve_target",
    "table_density",
    "target_coefficients",
    "timestep_density",
    "timestep_table",
    "weight_table",
]
