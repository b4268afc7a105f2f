"""The optimizer's ops and what people write in their place, on float32 parameters, gradients and averages."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erd_fast.benchmark.workload import Tensors, Workload, Wrap, elementwise
from erd_fast.ops import adamw_ema, grad_norm
from erd_fast.ops.adamw_ema import COLUMNS, Setting, StepState
from erd_fast.ops.core.selection import requested
from erd_fast.ops.tensor_table import Slot, TensorTable

SIZES = (32, 128)
"""Millions of parameters, of 2^20 each, beyond every cache; DiT-S has 33 and DiT-B 131."""
_TENSORS = 64
_LR, _BETA1, _BETA2, _EPS, _DECAY = 1e-4, 0.9, 0.999, 1e-8, 0.99


@dataclasses.dataclass(frozen=True)
class OptimizerCase:
    """One of the two ops on 64 tensors. It weighs nothing until it is built."""

    op: str
    size: int
    mode: str = ""
    called: bool = False
    usual: bool = True
    multiplies: bool = False

    @property
    def group(self) -> str:
        return f"ops/{self.op}"

    @property
    def name(self) -> str:
        return f"P={self.size}M"

    @property
    def ops(self) -> tuple[str, ...]:
        return (self.op,)

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        return ("eager", "compile") if self.op == "grad_norm" else ("eager",)

    def backends(self, device: torch.device) -> tuple[str, ...]:
        return ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton")

    def build(self, device: torch.device) -> Workload:
        return {"grad_norm": _grad_norm, "adamw_ema": _adamw_ema}[self.op](self, device)


def optimizer_cases(device: torch.device) -> list[OptimizerCase]:
    """Every case that is measured on ``device``: the larger ones want a GPU."""
    sizes = SIZES[:1] if device.type == "cpu" else SIZES
    return [OptimizerCase(op, size) for op, size in itertools.product(("grad_norm", "adamw_ema"), sizes)]


def _tensors(case: OptimizerCase, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    flat = torch.randn(_TENSORS, (case.size << 20) // _TENSORS, generator=generator, device=device)
    return [*flat.unbind()]


def _grad_norm(case: OptimizerCase, device: torch.device) -> Workload:
    """The table is there already, as it is in a step."""
    gradients = _tensors(case, device, 0)
    table = TensorTable(device)
    table.update([Slot(gradient) for gradient in gradients])

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        norm = wrap(lambda: torch.nn.utils.get_total_norm(gradients))
        return lambda copy: (norm(),)

    compare = functools.partial(elementwise, terms=lambda value: case.size << 20)
    return Workload(1, lambda copy: (grad_norm(gradients, table),), baseline, compare, bytes_moved=4 * case.size << 20)


class _Training(NamedTuple):
    """Parameters in training, by a step that changes them."""

    parameters: list[Tensor]
    averages: list[Tensor]
    step: Callable[[], object]

    def stepped(self) -> Tensors:
        self.step()
        return self.parameters[0], self.averages[0]


def _adamw_ema(case: OptimizerCase, device: torch.device) -> Workload:
    """Every variant begins at the same numbers, and is checked after its first step. Clipping is no part of it: the
    norm is given, and below the bound."""
    gradients = [gradient * 1e-3 for gradient in _tensors(case, device, 0)]
    begun: dict[str | None, _Training] = {}

    def ours(copy: int) -> Tensors:
        backend = requested("adamw_ema")
        if backend not in begun:
            begun[backend] = _ours(case, gradients, device)
        return begun[backend].stepped()

    def baseline(wrap: Wrap) -> Callable[[int], Tensors]:
        training = _theirs(case, gradients, device)
        return lambda copy: training.stepped()

    compare = functools.partial(elementwise, terms=lambda value: 1)
    return Workload(1, ours, baseline, compare, bytes_moved=36 * case.size << 20)


def _ours(case: OptimizerCase, gradients: list[Tensor], device: torch.device) -> _Training:
    parameters = _tensors(case, device, 1)
    averages = [parameter.clone() for parameter in parameters]
    moments = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
    rows = zip(gradients, parameters, *moments, averages, strict=True)
    slots = [Slot(g, p, m, v, emas=(ema,)) for g, p, m, v, ema in rows]
    table = TensorTable(device)
    table.update(slots)
    settings = torch.zeros(1, COLUMNS, dtype=torch.float64)
    named = {Setting.LR: _LR, Setting.BETA1: _BETA1, Setting.BETA2: _BETA2, Setting.EPS: _EPS}
    for column, value in {**named, Setting.GRAD_CLIP: 1e9, Setting.EMA_DECAY: _DECAY}.items():
        settings[0, column] = value
    settings, norm = settings.to(device), torch.ones((), device=device)
    counts, factors = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(1, COLUMNS, device=device)
    state = StepState(counts, torch.tensor([1.0, 0.0], device=device), factors)
    return _Training(parameters, averages, lambda: adamw_ema(slots, table, settings, norm, state))


def _theirs(case: OptimizerCase, gradients: list[Tensor], device: torch.device) -> _Training:
    parameters = [nn.Parameter(parameter) for parameter in _tensors(case, device, 1)]
    averages = [parameter.detach().clone() for parameter in parameters]
    betas = (_BETA1, _BETA2)
    optimizer = torch.optim.AdamW(parameters, lr=_LR, betas=betas, eps=_EPS, weight_decay=0.0, fused=True)
    taken = itertools.count(1)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        n = next(taken)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - min(_DECAY, n / (n + 9)))

    return _Training([parameter.detach() for parameter in parameters], averages, step)
