"""Ops and what people write in their place, on the same inputs."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.ops import diffusion_loss, draw, q_sample

SHAPE = (4, 32, 32)
ELEMENTS = 4096
GPU_SIZES = (8, 64, 256, 1024, 8192)
CPU_SIZES = (8, 64, 256)
_SCALE = 0.18215
_DATASET = 1_281_167


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One op on one input.

    ``ours`` and ``eager`` take the number of an input copy; what they return is compared where ``exact`` says so.
    """

    op: str
    name: str
    bytes_moved: int
    ours: Callable[[int], Any]
    eager: Callable[[int], Any]
    comparable: bool
    """Whether both compute the same numbers, so that they can be held against each other before they are timed."""


def op_cases(op: str, size: int, device: torch.device, copies: int) -> Iterator[OpCase]:
    """The cases of ``op`` on ``size`` images of (4, 32, 32), each with ``copies`` sets of inputs."""
    yield from {"draw": _draw, "q_sample": _q_sample, "diffusion_loss": _diffusion_loss}[op](size, device, copies)


def _draw(size: int, device: torch.device, copies: int) -> Iterator[OpCase]:
    counters = [torch.tensor(1000 + size * copy, device=device) for copy in range(copies)]

    def ours(copy: int) -> Any:
        return draw(counters[copy], seed=1, batch_size=size, dataset_size=_DATASET, num_timesteps=1000, label_drop=0.1)

    def eager(copy: int) -> Any:
        index = torch.randint(_DATASET, (size,), device=device)
        t = torch.randint(1000, (size,), device=device)
        return index, t, torch.rand(size, device=device) < 0.1, torch.rand(size, device=device) < 0.5

    yield OpCase("draw", f"N={size}", 26 * size, ours, eager, comparable=False)


def _q_sample(size: int, device: torch.device, copies: int) -> Iterator[OpCase]:
    """fp16 moments (mean, std), as a store keeps them; target v on the cosine schedule; x_t in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    process = DiffusionProcess(get_schedule("cosine"), "v", device=device)
    generator = torch.Generator(device).manual_seed(0)
    moments = torch.rand(copies, size, 8, 32, 32, generator=generator, device=device).half()
    noise, posterior = torch.randn(2, size, *SHAPE, generator=generator, device=device)
    scale = torch.full((4,), _SCALE, device=device)
    t = torch.randint(1000, (size,), generator=generator, device=device)
    ids = torch.arange(size, device=device)
    alpha, sigma = process.coefficients[:, :2].unbind(1)

    def ours(copy: int, **how: Any) -> Any:
        return q_sample(
            moments[copy], process.coefficients, t, kind="mean_std", scale=scale, ids=ids, seed=copy, dtype=dtype, **how
        )

    def chain(copy: int, posterior_noise: Tensor, eps: Tensor) -> Any:
        mean, std = moments[copy].chunk(2, dim=1)
        x0 = (mean.float() + std.float() * posterior_noise) * _SCALE
        a, s = alpha[t][:, None, None, None], sigma[t][:, None, None, None]
        return (a * x0 + s * eps).to(dtype), a * eps - s * x0

    def drawing(copy: int) -> Any:
        return chain(copy, torch.randn(size, *SHAPE, device=device), torch.randn(size, *SHAPE, device=device))

    moved = size * ELEMENTS * (2 * 2 + dtype.itemsize + 4)
    given = moved + size * ELEMENTS * 8
    yield OpCase("q_sample", f"drawn N={size}", moved, ours, drawing, comparable=False)
    yield OpCase(
        "q_sample",
        f"given N={size}",
        given,
        lambda copy: ours(copy, noise=noise, posterior_noise=posterior),
        lambda copy: chain(copy, posterior, noise),
        comparable=True,
    )


def _diffusion_loss(size: int, device: torch.device, copies: int) -> Iterator[OpCase]:
    """ERD-weighted loss with its gradient on the prediction."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    process = DiffusionProcess(get_schedule("cosine"), "v", device=device)
    generator = torch.Generator(device).manual_seed(0)
    predictions = torch.randn(copies, size, *SHAPE, generator=generator, device=device).to(dtype)
    target = torch.randn(size, *SHAPE, generator=generator, device=device)
    t = torch.randint(1000, (size,), generator=generator, device=device)

    def ours(copy: int) -> Any:
        result = diffusion_loss(predictions[copy], target, process.weight, t, compute_grad=True)
        return result.loss, result.dprediction

    def eager(copy: int) -> Any:
        prediction = predictions[copy].detach().requires_grad_()
        error = (prediction.float() - target).square().flatten(1).mean(1)
        loss = (process.weight[t] * error).mean()
        return loss.detach(), torch.autograd.grad(loss, prediction)[0]

    moved = size * ELEMENTS * (2 * dtype.itemsize + 4)
    yield OpCase("diffusion_loss", f"N={size}", moved, ours, eager, comparable=True)
