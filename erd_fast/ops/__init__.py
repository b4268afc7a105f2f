"""The op layer: every op of the engine, each a public function with its definition in a file of the same name."""

from erd_fast.ops.backends import BACKENDS, OPS, use_backend
from erd_fast.ops.declare import explain
from erd_fast.ops.diffusion_loss import DiffusionLoss, diffusion_loss
from erd_fast.ops.draw import Draw, draw
from erd_fast.ops.q_sample import LatentKind, QSample, q_sample

__all__ = [
    "BACKENDS",
    "OPS",
    "DiffusionLoss",
    "Draw",
    "LatentKind",
    "QSample",
    "diffusion_loss",
    "draw",
    "explain",
    "q_sample",
    "use_backend",
]
