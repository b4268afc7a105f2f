"""What a call of one op costs on a CPU besides its arithmetic: the eager overhead, compared with common code.

Inputs are so small (one sample of 16 tokens of width 192, one latent) that a call takes microseconds. Calls run on one
thread, thousands in a sample, and each op has a limit on the ratio of its time to the baseline's.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.benchmark.attention import eager_attention
from erd_fast.benchmark.workload import EPS, Call, Tensors, Workload, Wrap, elementwise
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.latents import KINDS
from erd_fast.ops import ada_layer_norm, attention, gelu_mlp, q_sample, use_backend
from erd_fast.random import Purpose

LIMITS = {"ada_layer_norm": 1.6, "attention": 1.4, "gelu_mlp": 1.25, "q_sample": 3.5}
_TOKENS, _WIDTH, _HEADS, _MLP_RATIO = 16, 192, 3, 4
_LATENT = (1, 4, 32, 32)
_ROUNDED = 4  # float32 tensors between inputs and result
_NORMALS = 2e-6  # by which drawn normals may differ between backends

Function = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class CallCase:
    """Forward calls of one op on one sample; mode ``grad``: on inputs that require a gradient."""

    op: str
    mode: str
    called: bool = True
    usual: bool = True
    multiplies: bool = False

    @property
    def group(self) -> str:
        return f"calls/{self.op}"

    @property
    def name(self) -> str:
        size = "4x32x32" if self.op == "q_sample" else f"T={_TOKENS} D={_WIDTH}"
        heads = f" H={_HEADS}" if self.op == "attention" else ""
        return f"N=1 {size}{heads} {self.mode}"

    @property
    def ops(self) -> tuple[str, ...]:
        return ("linear_gelu" if self.op == "gelu_mlp" else self.op,)

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        return ("kernel" if self.op == "q_sample" else "eager",)

    def backends(self, device: torch.device) -> tuple[str, ...]:
        return ("",)

    def build(self, device: torch.device) -> Workload:
        return _q_sample(self) if self.op == "q_sample" else _on_tokens(self)


def call_cases(device: torch.device) -> list[CallCase]:
    """Every case that is measured on ``device``, which is a CPU; q_sample has no gradient."""
    if device.type != "cpu":
        return []
    return [CallCase(op, mode) for op in LIMITS for mode in ("no-grad", "grad") if (op, mode) != ("q_sample", "grad")]


def _on_tokens(case: CallCase) -> Workload:
    x, wide = (1, _TOKENS, _WIDTH), _MLP_RATIO * _WIDTH
    functions: dict[str, tuple[Function, Function, tuple[tuple[int, ...], ...]]] = {
        "ada_layer_norm": (ada_layer_norm, _modulated, (x, (1, _WIDTH), (1, _WIDTH))),
        "attention": (_attention, functools.partial(eager_attention, _HEADS), ((1, _TOKENS, 3 * _WIDTH),)),
        "gelu_mlp": (gelu_mlp, _mlp, (x, (wide, _WIDTH), (wide,), (_WIDTH, wide), (_WIDTH,))),
    }
    ours, eager, sizes = functions[case.op]
    generator = torch.Generator().manual_seed(0)
    # Parameters are scaled by the root of their last dimension, so that all activations are of order 1.
    given = [torch.randn(size, generator=generator) / (1 if len(size) == 3 else size[-1] ** 0.5) for size in sizes]
    inputs = [tensor.requires_grad_(case.mode == "grad") for tensor in given]

    def call_of(function: Function) -> Call:
        return lambda copy: (function(*inputs),)

    return Workload(
        1,
        call_of(ours),
        lambda wrap: call_of(wrap(eager)),
        functools.partial(elementwise, terms=lambda value: wide, relative=lambda ours: _ROUNDED * EPS),
        limit=LIMITS[case.op],
    )


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (_WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _attention(qkv: Tensor) -> Tensor:
    return attention(qkv, _HEADS)


def _mlp(x: Tensor, weight: Tensor, bias: Tensor, next_weight: Tensor, next_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight, bias), approximate="tanh"), next_weight, next_bias)


def _q_sample(case: CallCase) -> Workload:
    """The public function, compared with its compiled kernel called on outputs that are already allocated."""
    process = DiffusionProcess(get_schedule("cosine"), "v")
    latents = torch.randn(_LATENT, generator=torch.Generator().manual_seed(0))
    coefficients, t_index, ids = process.coefficients, torch.tensor([500]), torch.tensor([7])
    x_t, target = torch.empty(_LATENT), torch.empty(_LATENT)

    def ours(copy: int) -> Tensors:
        return q_sample(latents, coefficients, t_index, ids=ids, seed=1)

    def kernel(copy: int) -> Tensors:
        # Positional, as the schema has them: index, kind, scale, shift, flip; noise, posterior_noise, patch.
        rest = None, KINDS.index("sample"), None, None, None, ids, 1, int(Purpose.TRAIN), None, None, 0
        torch.ops._erd_fast_C.q_sample_fwd(latents, coefficients, t_index, *rest, x_t, target)
        return x_t, target

    def baseline(wrap: Wrap) -> Call:
        return kernel

    def truth() -> Tensors:
        with use_backend("reference"):
            return ours(0)

    ours(0)  # loads the extension
    compare = functools.partial(elementwise, terms=lambda value: 1, relative=lambda ours: _NORMALS)
    return Workload(1, ours, baseline, compare, others={"kernel": kernel}, truth=truth, limit=LIMITS["q_sample"])
