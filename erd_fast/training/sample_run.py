"""Samples from a run folder or one of its checkpoints."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.diffusion import get_schedule
from erd_fast.errors import ConfigError, DataError
from erd_fast.models import create_model
from erd_fast.sampling import GuidanceInterval
from erd_fast.sampling.images import Latents, Pixels, generate, to_pixels
from erd_fast.training.checkpoint import CheckpointState, latest_checkpoint, load_state, load_weights
from erd_fast.training.preview import spread_labels


def sample_run(
    path: Path,
    count: int,
    *,
    classes: tuple[int, ...] = (),
    steps: int = 50,
    cfg_scale: float = 1.0,
    guidance_interval: GuidanceInterval | None = None,
    seed: int = 0,
    ema: bool = True,
) -> tuple[Pixels | Latents, NDArray[np.int64] | None]:
    """``count`` samples by the averaged weights (``ema``) of a run's newest checkpoint, or of the checkpoint ``path``.

    Args:
        classes: labels to cycle through; none spreads over all classes.

    Returns:
        Images (N, H, W, C) uint8, or of a run on latents the latents z = x0 / scale + shift (N, C, H, W) float32, which
        want their autoencoder; and labels (None for an unconditional model).

    Raises:
        ConfigError: count, classes or sampler settings are not allowed. DataError: no checkpoint there, or a damaged
            one.
    """
    checkpoint = find_checkpoint(path)
    if count < 1:
        raise ConfigError(f"n: given {count}, allowed 1 or more")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed: given {seed}, allowed 0 to 2**64 - 1")
    state = load_state(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(**state.model, device="meta")
    load_weights(checkpoint, model, ema)
    labels = _labels(count, classes, int(state.model["num_classes"]))
    samples = generate(
        model.to(device).eval(),
        get_schedule(state.schedule),
        state.target,
        labels,
        count,
        seed=seed,
        steps=steps,
        cfg_scale=cfg_scale,
        guidance_interval=guidance_interval,
    )
    named = None if labels is None else labels.numpy()
    return (to_pixels(samples) if state.kind == "pixels" else _latents(samples, state)), named


def find_checkpoint(path: Path) -> Path:
    """``path`` if it is a checkpoint, else the newest one of the run ``path``. Raises DataError if there is none."""
    checkpoint = path if (path / "state.json").is_file() else latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{path} is no checkpoint and no run with one (no state.json, no checkpoints/step-*)")
    return checkpoint


def _latents(samples: Tensor, state: CheckpointState) -> Latents:
    latents = samples.cpu()
    if state.scale:
        latents = latents / torch.tensor(state.scale)[:, None, None]
    if state.shift:
        latents = latents + torch.tensor(state.shift)[:, None, None]
    return latents.numpy()


def _labels(count: int, classes: tuple[int, ...], num_classes: int) -> Tensor | None:
    for label in classes:
        if not 0 <= label < num_classes:
            allowed = f"0 to {num_classes - 1}" if num_classes else "none, the model is unconditional"
            raise ConfigError(f"classes: given {label}, allowed {allowed}")
    if not classes:
        return spread_labels(count, num_classes)
    return torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
