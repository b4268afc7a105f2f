"""Training steps as people write them, from pieces of PyTorch, and these pieces: noising, loss, optimizer.

The baselines compute what ours does: one schedule, target, weight, clipping, AdamW and average. They draw their own
numbers, and keep them for the check.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from erd_fast.benchmark.op_cases import noised, weighted_mse
from erd_fast.benchmark.step_cases import Draws, Problem
from erd_fast.diffusion import DiffusionProcess
from erd_fast.numerics import allow_reduced_precision_reductions
from erd_fast.ops import DiffusionLoss, Draw, QSample
from erd_fast.ops.patchify import patchify, unpatchify
from erd_fast.training.config import OptimConfig

Make = Callable[..., torch.optim.Optimizer]
"""An optimizer of (parameters, lr=, betas=, weight_decay=)."""


class TorchProcess:
    """A :class:`DiffusionProcess` of PyTorch's random numbers, with an op of PyTorch for each term of its formulas.

    It takes the place of one in a :class:`TrainStep`. ``drawn`` is what it drew last; in a CUDA graph a replay does.
    """

    drawn: Draws

    def __init__(self, process: DiffusionProcess, side: int):
        self.time, self.weight = process.time, process.weight
        self._alpha, self._sigma = process.coefficients[:, :2].unbind(1)
        self._side = side
        self._device = process.time.device

    def draw(self, *unused: Any, batch_size: int, dataset_size: int, label_drop: float, **also_unused: Any) -> Draw:
        index = torch.randint(dataset_size, (batch_size,), device=self._device)
        t_index = torch.randint(len(self.time), (batch_size,), device=self._device)
        self._dropped = torch.rand(batch_size, device=self._device) < label_drop
        return Draw(index, index, t_index, self._dropped, self._dropped)  # no noise hangs on ids, and none is mirrored

    def q_sample(
        self, latents: Tensor, t_index: Tensor, *, index: Tensor, dtype: torch.dtype, patch: int = 0, **unused: Any
    ) -> QSample:
        moments = latents[index]
        mean = moments.chunk(2, dim=1)[0]
        posterior, noise = (torch.randn(mean.shape, device=self._device) for _ in range(2))
        self.drawn = Draws(index, t_index, self._dropped, posterior, noise)
        x_t, target = noised(moments, posterior, noise, self._alpha[t_index], self._sigma[t_index], dtype)
        return QSample(patchify(x_t, patch).contiguous() if patch else x_t, target)

    def loss(
        self, prediction: Tensor, target: Tensor, t_index: Tensor, *, num_bins: int, patch: int = 0, **unused: Any
    ) -> DiffusionLoss:
        """Gradient by autograd; none of the sums that a run logs."""
        given = prediction.requires_grad_()
        image = unpatchify(given, patch, self._side, self._side) if patch else given
        loss = weighted_mse(image, target, self.weight, t_index)
        (gradient,) = torch.autograd.grad(loss, given)
        none = torch.zeros(num_bins, device=self._device)
        return DiffusionLoss(loss.detach(), none[:0], none, none, gradient)


class TorchOptimizer:
    """Clipping, an AdamW that somebody else has written, then averages: what :class:`AdamWEMA` does in one.

    It takes the place of one in a :class:`TrainStep`. Parameters in low precision have float32 ``masters``, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masters: Mapping[str, Tensor],
        optim: OptimConfig,
        make: Make,
        average: Callable[[Sequence[Tensor], Sequence[Tensor], float], None],
        scale_loss: bool = False,
    ):
        self.masters, self.decay = masters, optim.ema_decay
        self.averages = {name: master.detach().clone() for name, master in masters.items()}
        self.inner = make([*masters.values()], lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
        device = next(iter(masters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)
        self.grad_norm = torch.zeros((), device=device)
        self._parameters, self._clip, self._average = parameters, optim.grad_clip, average
        self._lowered = [
            (parameters[name], master) for name, master in masters.items() if parameters[name] is not master
        ]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in self._lowered:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.scaler.unscale_(self.inner)
        self.grad_norm = clip_grad_norm_([*self.masters.values()], self._clip)
        self.scaler.step(self.inner)
        self.scaler.update()
        self._average([*self.averages.values()], [*self.masters.values()], self.decay)
        if self._lowered:
            parameters, masters = zip(*self._lowered, strict=True)
            torch._foreach_copy_(parameters, masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for tensor in (*self._parameters.values(), *self.masters.values()):
            tensor.grad = None

    def refresh(self) -> None:
        """Nothing changes between steps."""


def average_in_a_loop(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    for average, value in zip(averages, values, strict=True):
        average.mul_(decay).add_(value, alpha=1 - decay)


def average_at_once(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    torch._foreach_lerp_([*averages], [*values], 1 - decay)


class Recipe(NamedTuple):
    """What tells a baseline from the others."""

    optimizer: Make = functools.partial(torch.optim.AdamW, fused=True)
    average: Callable[[Sequence[Tensor], Sequence[Tensor], float], None] = average_at_once
    half: torch.dtype = torch.bfloat16
    """Of autocast, where ours is in low precision. float16 scales its loss."""
    compiled: dict[str, Any] | None = None
    """Arguments of torch.compile for the model."""
    reads_loss: bool = False


_STATIC: dict[str, Any] = {"fullgraph": True, "dynamic": False}
RECIPES = {
    "official": Recipe(torch.optim.AdamW, average_in_a_loop, torch.float16, reads_loss=True),
    "sdpa-fused": Recipe(),
    "compile": Recipe(compiled=_STATIC),
    "compile-graphs": Recipe(compiled={**_STATIC, "mode": "reduce-overhead"}),
}
"""The baselines by name. All call F.scaled_dot_product_attention, as the published models do."""


def baselines(device: torch.device) -> dict[str, Recipe]:
    """Those that can run on ``device``: CUDA graphs want a GPU, and so does NVIDIA's apex (PyPI has another project of
    this name)."""
    if device.type == "cpu":
        return {name: recipe for name, recipe in RECIPES.items() if name != "compile-graphs"}
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return RECIPES
    return {**RECIPES, "apex": Recipe(fused_adam)}


class Baseline:
    """A model in training by a recipe."""

    def __init__(self, problem: Problem, recipe: Recipe):
        config, self._problem, self._recipe = problem.config, problem, recipe
        self.model = problem.model(config)
        self.model.kernels = False
        self.low_precision = config.train.precision != "fp32"
        parameters = dict(self.model.named_parameters())
        scaled = self.low_precision and recipe.half == torch.float16
        how = parameters, parameters, config.optim, recipe.optimizer, recipe.average, scaled
        self.optimizer = TorchOptimizer(*how)
        self._process = TorchProcess(problem.process, self.model.input_size)
        self._network = self.model if recipe.compiled is None else torch.compile(self.model, **recipe.compiled)
        autocast = functools.partial(torch.autocast, problem.device.type, recipe.half)
        self._autocast = autocast if self.low_precision else contextlib.nullcontext

    def step(self) -> Tensor:
        """Draw, gather, noise, model, loss, backward, clip, AdamW, average."""
        allow_reduced_precision_reductions(True)  # PyTorch's default; variants of ours step between, and forbid it
        problem, process = self._problem, self._process
        train = problem.config.train
        self.optimizer.zero_grad()
        if self._recipe.compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()  # what graphs gave the step before may be overwritten
        decided = process.draw(
            batch_size=train.batch_size, dataset_size=len(problem.store), label_drop=train.label_drop
        )
        index, t_index = decided.sample_index, decided.t_index
        x_t, target = process.q_sample(problem.batch.latents, t_index, index=index, dtype=torch.float32)
        with self._autocast():
            prediction = self._network(x_t, process.time[t_index], problem.labels(process.drawn))
        loss = weighted_mse(prediction, target, process.weight, t_index)
        self.optimizer.scaler.scale(loss).backward()
        self.optimizer.step()
        if self._recipe.reads_loss:
            loss.item()
        return loss.detach()

    def drawn(self) -> Draws:
        """What the last step was taken on."""
        return self._process.drawn
