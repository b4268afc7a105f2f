"""The op layer: every op of the engine, each a public function with its definition in a file of the same name."""

from erd_fast.latents import LatentKind
from erd_fast.ops.ada_layer_norm import ada_layer_norm
from erd_fast.ops.adamw_ema import adamw_ema
from erd_fast.ops.attention import attention
from erd_fast.ops.core.autotune import Autotuner, autotune
from erd_fast.ops.core.recording import Recording, record
from erd_fast.ops.core.selection import BACKENDS, OPS, explain, use_backend
from erd_fast.ops.diffusion_loss import DiffusionLoss, diffusion_loss
from erd_fast.ops.draw import Draw, draw
from erd_fast.ops.grad_norm import grad_norm
from erd_fast.ops.linear_gelu import gelu_mlp, linear_gelu
from erd_fast.ops.q_sample import QSample, q_sample
from erd_fast.ops.residual_ada_layer_norm import Branch, residual_ada_layer_norm

__all__ = [
    "BACKENDS",
    "OPS",
    "Autotuner",
    "Branch",
    "DiffusionLoss",
    "Draw",
    "LatentKind",
    "QSample",
    "Recording",
    "ada_layer_norm",
    "adamw_ema",
    "attention",
    "autotune",
    "diffusion_loss",
    "draw",
    "explain",
    "gelu_mlp",
    "grad_norm",
    "linear_gelu",
    "q_sample",
    "record",
    "residual_ada_layer_norm",
    "use_backend",
]
