"""Does a step compute what it should? Its loss and gradients beside plain PyTorch in float32, its update beside AdamW's
formula in float64.

Any step can be checked, also the replay of a CUDA graph: what it began with and what it left are copied to the host.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from erd_fast.benchmark.model_cases import CHUNK, distance, relative
from erd_fast.benchmark.op_cases import noised, weighted_mse
from erd_fast.benchmark.ops import refuse_off
from erd_fast.benchmark.step_baselines import TorchOptimizer
from erd_fast.benchmark.step_cases import Draws, Problem
from erd_fast.benchmark.workload import EPS, Deviation
from erd_fast.models import DiffusionModel
from erd_fast.numerics import float32_products
from erd_fast.optim import AdamWEMA
from erd_fast.training.config import OptimConfig, RunConfig

Named = dict[str, Tensor]
_ADAM_EPS = 1e-8
_CLIP_EPS = 1e-6  # PyTorch clips by norm + 1e-6
_MOST_SKIPPED = 20  # from a loss scale of 2^16 down to one that fits
_ROUNDED = 16  # float32 operations from a gradient to a parameter


class Trainer(Protocol):
    """A model in training."""

    @property
    def model(self) -> DiffusionModel: ...

    @property
    def optimizer(self) -> AdamWEMA | TorchOptimizer: ...

    @property
    def low_precision(self) -> bool:
        """Whether its matrix products are in bfloat16 or float16."""

    def step(self) -> Tensor:
        """Take a step. Returns its loss, on the device."""

    def drawn(self) -> Draws:
        """What the last step was taken on."""


class State(NamedTuple):
    """What an optimizer holds: float32, by the names of the parameters."""

    taken: int
    decay: float
    """Of the averages, in the next step."""
    values: Named
    exp_avg: Named
    exp_avg_sq: Named
    averages: Named


class Evidence(NamedTuple):
    """One step, on the host: what it began with, did and left."""

    drawn: Draws
    before: State
    loss: Tensor
    gradients: Named
    clipped: bool
    values: Named
    averages: Named
    copies: Named
    """Parameters in low precision."""
    low_precision: bool


class Off(NamedTuple):
    """Relative differences from plain PyTorch in float32; that of the gradient which is off most."""

    loss: float
    gradient: float


def witness(trainer: Trainer) -> Evidence:
    """Take a step and note all of it. A step that float16 skips, to find its loss scale, is taken again."""
    taken, decay, *kept = _state(trainer)
    before = State(taken, decay, *map(_on_host, kept))
    for _ in range(_MOST_SKIPPED):
        scale = _loss_scale(trainer)
        loss = trainer.step().to("cpu", copy=True)
        after = _state(trainer)
        if after.taken > taken:
            break
    parameters = trainer.model.named_parameters()
    return Evidence(
        Draws(*(tensor.cpu() for tensor in trainer.drawn())),
        before,
        loss,
        *_gradients(trainer, scale),
        _on_host(after.values),
        _on_host(after.averages),
        {name: p.detach().to("cpu", copy=True) for name, p in parameters if p.dtype != torch.float32},
        trainer.low_precision,
    )


def check(problem: Problem, evidence: Evidence, where: str) -> Off:
    """How far loss and gradients of a step are off. Raises RunError where these, or what it made of the parameters, are
    off by more than they may be; ``where`` names it."""
    loss, *gradients = _of_gradients(problem, evidence)
    refuse_off(where, (loss, *gradients, *_of_update(problem.config.optim, evidence, problem.device)))
    return Off(loss.error, max(gradient.error for gradient in gradients))


def _of_gradients(problem: Problem, evidence: Evidence) -> Iterator[Deviation]:
    model = problem.model(_plain(problem))
    loss, gradients = _truth(problem, model, evidence)
    if evidence.clipped:
        factor = _clipping(gradients, problem.config.optim.grad_clip)
        gradients = {name: gradient * factor for name, gradient in gradients.items()}
    blocks = sum(name.endswith("attn") for name, _ in model.named_modules())
    longest = max(value[0].numel() for value in gradients.values())
    # float16 has more digits than bfloat16, and what is lost below its range.
    off = relative(torch.bfloat16 if evidence.low_precision else torch.float32, blocks, longest)
    yield Deviation("loss", distance(evidence.loss, loss), off)
    for name, gradient in gradients.items():
        yield Deviation(name, distance(evidence.gradients[name], gradient), off)


def _plain(problem: Problem) -> RunConfig:
    return dataclasses.replace(problem.config, model=dataclasses.replace(problem.config.model, kernels=False))


def _truth(problem: Problem, model: DiffusionModel, evidence: Evidence) -> tuple[Tensor, Named]:
    """Loss and gradients, on the host, by plain PyTorch in float32, a few images at a time: at the parameters that the
    step began with, on what it drew."""
    process, device = problem.process, problem.device
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(evidence.before.values[name])
    size = len(evidence.drawn.t_index)
    total = torch.zeros((), device=device)
    with float32_products(tf32=False):
        for begin in range(0, size, CHUNK):
            part = Draws(*(tensor[begin : begin + CHUNK].to(device) for tensor in evidence.drawn))
            alpha, sigma = process.coefficients[part.t_index, :2].unbind(1)
            moments = problem.batch.latents[part.sample_index]
            x_t, target = noised(moments, part.posterior, part.noise, alpha, sigma, torch.float32)
            prediction = model(x_t, process.time[part.t_index], problem.labels(part))
            loss = weighted_mse(prediction, target, process.weight, part.t_index) * (len(part.t_index) / size)
            loss.backward()
            total += loss.detach()
    return total.cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def _of_update(optim: OptimConfig, evidence: Evidence, device: torch.device) -> Iterator[Deviation]:
    """AdamW on the step's own gradients, from what it began with. A parameter may be off by its own rounding and, as a
    part of its change, by those on the way and by that of the norm, a sum over all gradients."""
    before = evidence.before
    factor = 1.0 if evidence.clipped else _clipping(evidence.gradients, optim.grad_clip)
    count = sum(gradient.numel() for gradient in evidence.gradients.values())
    off = _ROUNDED * EPS + math.sqrt(count) * EPS / 2
    for name in before.values:
        first = [kept[name] for kept in (before.values, before.exp_avg, before.exp_avg_sq, before.averages)]
        old, m, v, average = (tensor.to(device).double() for tensor in first)
        new = evidence.values[name].to(device).double()
        gradient = evidence.gradients[name].to(device).double() * factor
        wanted = old + _change(optim, old, m, v, gradient, before.taken + 1)
        allowed = EPS * float(old.norm()) + off * float((wanted - old).norm())
        yield Deviation(f"{name} after the step", float((new - wanted).norm()), allowed)
        averaged = average + (1 - before.decay) * (new - average)
        found = evidence.averages[name].to(device).double()
        yield Deviation(f"average of {name}", float((found - averaged).norm()), 2 * EPS * float(average.norm()))
    for name, copy in evidence.copies.items():
        differs = (copy != evidence.values[name].to(copy.dtype)).sum()
        yield Deviation(f"copy of {name}", float(differs), 0.0)


def _change(optim: OptimConfig, value: Tensor, m: Tensor, v: Tensor, gradient: Tensor, step: int) -> Tensor:
    beta1, beta2 = optim.betas
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient.square()
    denominator = (v / (1 - beta2**step)).sqrt() + _ADAM_EPS
    return -optim.lr * (optim.weight_decay * value + m / (1 - beta1**step) / denominator)


def _clipping(gradients: Named, clip: float) -> float:
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    return min(1.0, clip / (norm + _CLIP_EPS))


def _loss_scale(trainer: Trainer) -> float:
    """What the next step multiplies its loss by and leaves in the gradients."""
    optimizer = trainer.optimizer
    return 1.0 if isinstance(optimizer, TorchOptimizer) else float(optimizer.loss_scale)


def _gradients(trainer: Trainer, scale: float) -> tuple[Named, bool]:
    """The gradients of the loss as a step left them, times ``scale``; and whether they are clipped by now."""
    optimizer = trainer.optimizer
    if isinstance(optimizer, TorchOptimizer):  # which has divided them by the loss scale
        return _on_host({name: p.grad for name, p in optimizer.masters.items() if p.grad is not None}), True
    found = _on_host({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    return {name: gradient / scale for name, gradient in found.items()}, False


def _state(trainer: Trainer) -> State:
    """As it is, not copied."""
    optimizer, parameters = trainer.optimizer, dict(trainer.model.named_parameters())
    if isinstance(optimizer, TorchOptimizer):
        values, averages = dict(optimizer.masters), optimizer.averages
        states = {name: optimizer.inner.state[master] for name, master in values.items()}
        counted = (*states.values(), *optimizer.inner.param_groups)  # apex counts in a group
        taken = next(int(state["step"]) for state in counted if "step" in state)
        decay = optimizer.decay
    else:
        values = {name: optimizer.master(p) for name, p in parameters.items()}
        averages = {name: optimizer.average(p) for name, p in parameters.items()}
        states = {name: optimizer.state[p] for name, p in parameters.items()}
        taken = int(optimizer.counts[0])
        decay = min(optimizer.param_groups[0]["ema_decay"], (taken + 1) / (taken + 10))
    exp_avg, exp_avg_sq = ({name: state[key] for name, state in states.items()} for key in ("exp_avg", "exp_avg_sq"))
    return State(taken, decay, values, exp_avg, exp_avg_sq, averages)


def _on_host(tensors: Named) -> Named:
    return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in tensors.items()}
