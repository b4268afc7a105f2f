"""A training step of ours, and the same with one piece of it switched off."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from erd_fast.benchmark.step_baselines import TorchOptimizer, TorchProcess, average_at_once
from erd_fast.benchmark.step_cases import Draws, Problem
from erd_fast.errors import ConfigError, unknown_name
from erd_fast.numerics import allow_reduced_precision_reductions
from erd_fast.ops import Autotuner, autotune
from erd_fast.optim import AdamWEMA
from erd_fast.training.build import make_optimizer, make_process
from erd_fast.training.config import RunConfig
from erd_fast.training.distributed import Ranks
from erd_fast.training.graph import StepGraph
from erd_fast.training.step import TrainStep

OURS = "erd-fast"
IN_BFLOAT16, IN_FLOAT16 = "erd-fast bf16", "erd-fast fp16"
_CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    IN_BFLOAT16: ("train", {"precision": "bf16"}),
    IN_FLOAT16: ("train", {"precision": "fp16"}),
    "no-graph": ("train", {"cuda_graph": False}),
    "no-kernels": ("model", {"kernels": False}),
    "recompute-on": ("model", {"recompute": "on"}),
    "recompute-off": ("model", {"recompute": "off"}),
}
"""Variants that are fields of the configuration: section, and the fields' values."""
_NO_OPTIMIZER, _NO_NOISE_LOSS = "no-fused-optimizer", "no-fused-noise-loss"
_VARIANTS = (OURS, *_CHANGES, _NO_OPTIMIZER, _NO_NOISE_LOSS)


def ablations(device: torch.device) -> tuple[str, ...]:
    """Names of ours with one piece changed, on ``device``: bfloat16 is what a GPU has anyway, and ``recompute`` is
    changed to what it is not by itself."""
    pieces = (_NO_OPTIMIZER, _NO_NOISE_LOSS, "no-kernels")
    if device.type == "cuda":
        return ("no-graph", *pieces, "recompute-off")
    return (*((IN_BFLOAT16,) if _multiplies_bfloat16() else ()), *pieces, "recompute-on")


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without them a step takes several times as long as in float32."""
    try:
        found = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not found.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


class Ours:
    """A model in training as a run trains it: a :class:`TrainStep` in a :class:`StepGraph`, put together as
    :func:`erd_fast.training.build.build_step` does it, but for the numbers that the model begins with."""

    def __init__(self, problem: Problem, name: str):
        if name not in _VARIANTS:
            raise ConfigError(unknown_name("variant", name, _VARIANTS))
        self._problem = problem
        config = _changed(problem.config, name)
        self.model = problem.model(config)
        self.low_precision = config.train.precision != "fp32"
        process, optimizer = make_process(config, problem.device), make_optimizer(config, self.model)
        step = TrainStep(config, self.model, optimizer, process, problem.store, problem.device, Ranks())
        self._torch_process = TorchProcess(process, self.model.input_size) if name == _NO_NOISE_LOSS else None
        if self._torch_process is not None:
            step.process = cast(Any, self._torch_process)
        if name == _NO_OPTIMIZER:
            step.optimizer = cast(Any, _torch_optimizer(config, optimizer, self.model))
        self.optimizer: AdamWEMA | TorchOptimizer = step.optimizer
        self.tuner = Autotuner(captured=config.train.cuda_graph)
        with autotune(self.tuner):
            step.rehearse(step.micro_batch)
        self.tuner.timing = False
        self._step, self._graph = step, StepGraph(step)
        self._batches = itertools.repeat(problem.batch)

    def step(self) -> Tensor:
        allow_reduced_precision_reductions(False)
        with autotune(self.tuner):
            return self._graph(self._batches)

    @property
    def is_as_named(self) -> bool:
        """False where a graph was wanted and could not be captured: after warm-up."""
        train = self._step.config.train
        return self._step.device.type != "cuda" or self._graph.captured == train.cuda_graph

    def drawn(self) -> Draws:
        """What the last step was taken on: by the definition, unless PyTorch has drawn."""
        if self._torch_process is not None:
            return self._torch_process.drawn
        return self._problem.drawn_by_definition(int(self._step.counter) - self._step.config.train.batch_size)


def _changed(config: RunConfig, name: str) -> RunConfig:
    if name not in _CHANGES:
        return config
    section, fields = _CHANGES[name]
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **fields)}
    return dataclasses.replace(config, **changed)


def _torch_optimizer(config: RunConfig, optimizer: AdamWEMA, model: torch.nn.Module) -> TorchOptimizer:
    """Fused AdamW and averages by foreach, of the parameters and masters of ``optimizer``."""
    parameters = dict(model.named_parameters())
    masters = {name: p if p.dtype == torch.float32 else optimizer.master(p) for name, p in parameters.items()}
    in_graph = next(iter(parameters.values())).is_cuda
    make = functools.partial(torch.optim.AdamW, fused=True, capturable=in_graph)
    return TorchOptimizer(parameters, masters, config.optim, make, average_at_once)
