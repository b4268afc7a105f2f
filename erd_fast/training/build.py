"""From a configuration to what trains: store, model, process, optimizer."""

import dataclasses
from typing import Any

import torch

from erd_fast.data import LatentStore, open_dataset
from erd_fast.data.check import check_scale
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.errors import ConfigError
from erd_fast.models import DiffusionModel, create_model, model_flops
from erd_fast.nn.precision import lower_precision
from erd_fast.numerics import PRECISION_DTYPES, set_numerics
from erd_fast.optim import AdamWEMA
from erd_fast.training.config import RunConfig, config_text
from erd_fast.training.distributed import Ranks
from erd_fast.training.step import TrainStep


def open_store(config: RunConfig) -> LatentStore:
    """The store of ``data.path``, checked against the configuration.

    Raises:
        ConfigError: the two do not fit. DataError: the store is missing or damaged, or its numbers are not fit to train
            on.
    """
    if not config.data.path:
        raise ConfigError(
            '--data.path must name a latent store; make one with "erd-fast data encode" or "erd-fast data import"'
        )
    store = open_dataset(config.data.path)
    if not store.manifest.num_classes and config.eval.cfg_scale != 1:
        raise ConfigError(f"eval.cfg_scale: given {config.eval.cfg_scale}, allowed 1: {store.path} has no classes")
    _, height, width = store.manifest.shape
    if height != width:
        raise ConfigError(f"data.path: {store.path} holds {height} x {width} images; allowed square ones")
    if config.data.check:
        check_scale(store)
    return store


def describe(config: RunConfig) -> str:
    """What ``--dry-run`` prints: the configuration as YAML, then the size of the run. Makes no run folder."""
    store = open_store(config)
    model = create_model(**model_arguments(config, store), device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    per_image, images = 3 * model_flops(model), config.train.steps * config.train.batch_size
    size = (
        f"# {config.model.name}: {parameters:,} parameters, {per_image / 1e9:.3f} GFLOP an image in training\n"
        f"# {store.path}: {len(store):,} samples, {store.manifest.kind} {store.manifest.shape}\n"
        f"# {config.train.steps:,} steps of {config.train.batch_size} images: {images / len(store):.2f} epochs, "
        f"{images * per_image / 1e15:.3g} PFLOP"
    )
    return f"{config_text(config)}{size}"


def build_step(config: RunConfig, store: LatentStore, device: torch.device, ranks: Ranks | None = None) -> TrainStep:
    """The step of this configuration at its start; the models of all ranks are equal."""
    set_numerics(config.train.precision, device, deterministic=config.train.deterministic)
    how = {**model_arguments(config, store), **computing(config)}
    model = create_model(**how, seed=config.train.seed, device=device)
    optimizer = make_optimizer(config, model)
    return TrainStep(config, model, optimizer, make_process(config, device), store, device, ranks or Ranks())


def make_optimizer(config: RunConfig, model: DiffusionModel) -> AdamWEMA:
    """The optimizer of this configuration; a model with fused ops gets parameters of its precision, see
    :class:`TrainStep`."""
    optim, train = config.optim, config.train
    dtype = PRECISION_DTYPES[train.precision]
    lowered = dtype != torch.float32 and model.kernels
    masters = lower_precision(model, dtype) if lowered else None
    return AdamWEMA(
        model.parameters(),
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        ema_decay=optim.ema_decay,
        grad_clip=optim.grad_clip,
        warmup=optim.warmup,
        cosine_steps=train.steps if optim.schedule == "cosine" else 0,
        masters=masters,
        scale_loss=train.precision == "fp16",
    )


def make_process(config: RunConfig, device: torch.device | str = "cpu") -> DiffusionProcess:
    """The process that ``config.diffusion`` describes; its fields have the names of the arguments."""
    fields = dataclasses.asdict(config.diffusion)
    return DiffusionProcess(get_schedule(fields.pop("schedule")), **fields, device=device)


def model_arguments(config: RunConfig, store: LatentStore) -> dict[str, Any]:
    """Arguments of ``create_model`` for this configuration on this store."""
    channels, size, _ = store.manifest.shape
    return {
        "name": config.model.name,
        **config.model.overrides(),
        "input_size": size,
        "in_channels": channels,
        "num_classes": store.manifest.num_classes,
        "null_label": config.train.label_drop > 0,
    }


def computing(config: RunConfig) -> dict[str, Any]:
    """Arguments of ``create_model`` that say how the model computes, and not what."""
    model = config.model
    return {
        "kernels": model.kernels,
        "residual": torch.bfloat16 if model.residual == "bf16" else torch.float32,
        "recompute": {"auto": None, "on": True, "off": False}[model.recompute],
    }
