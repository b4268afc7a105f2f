"""Samples from a run folder or one of its checkpoints."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from erd_fast.diffusion import get_schedule
from erd_fast.errors import ConfigError, DataError
from erd_fast.models import create_model
from erd_fast.sampling import GuidanceInterval
from erd_fast.sampling.images import Pixels, generate, to_pixels
from erd_fast.training.checkpoint import latest_checkpoint, load_state, load_weights
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
) -> tuple[Pixels, NDArray[np.int64] | None]:
    """``count`` images by the averaged weights (``ema``) of a run's newest checkpoint, or of the checkpoint ``path``.

    Args:
        classes: labels to cycle through; none spreads over all classes.

    Returns:
        uint8 images (N, H, W, C), and their labels (None for an unconditional model).

    Raises:
        ConfigError: count, classes or sampler settings are not allowed. DataError: no checkpoint there, or a damaged
            one.
    """
    checkpoint = path if (path / "state.json").is_file() else latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{path} is no checkpoint and no run with one (no state.json, no checkpoints/step-*)")
    if count < 1:
        raise ConfigError(f"n: given {count}, allowed 1 or more")
    state = load_state(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(**state.model)
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
    return to_pixels(samples), None if labels is None else labels.numpy()


def _labels(count: int, classes: tuple[int, ...], num_classes: int) -> torch.Tensor | None:
    for label in classes:
        if not 0 <= label < num_classes:
            allowed = f"0 to {num_classes - 1}" if num_classes else "none, the model is unconditional"
            raise ConfigError(f"classes: given {label}, allowed {allowed}")
    if not classes:
        return spread_labels(count, num_classes)
    return torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
