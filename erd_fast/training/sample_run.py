"""Samples from a run folder or one of its checkpoints."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.autoencoder import open_autoencoder
from erd_fast.diffusion import get_schedule
from erd_fast.errors import ConfigError, DataError, ErdFastError
from erd_fast.models import create_model
from erd_fast.sampling import GuidanceInterval
from erd_fast.sampling.images import Latents, Pixels, generate, latent_decoder, to_latents, to_pixels
from erd_fast.training.checkpoint import latest_checkpoint, load_state, load_weights
from erd_fast.training.preview import spread_labels


def open_decoder(path: Path, vae: str = "", *, pictures: bool = False) -> Callable[[Tensor], Pixels | Latents]:
    """Open the decoder of a run's samples; before sampling, so that a missing autoencoder is found first.

    Args:
        path: a run or a checkpoint.
        vae: autoencoder of a run on latents: a folder, or a Hugging Face hub ID, which may be downloaded. Empty: the
            recorded one, from local files and the local cache only. ``none``: samples stay latents.
        pictures: refuse latents.

    Returns:
        A function from samples x0 (N, C, H, W) to images (N, H, W, C) uint8, or to the latents that an autoencoder
        decodes, z = x0 / scale + shift (N, C, H, W) float32.

    Raises:
        ConfigError: diffusers is not installed, the autoencoder has another number of channels, or ``vae`` does not fit
            the run. DataError: no checkpoint there, or the autoencoder is missing, damaged or not the recorded one.
    """
    state = load_state(find_checkpoint(path))
    if state.kind == "pixels":
        if vae not in ("", "none"):
            raise ConfigError(f"vae must be none for a run on pixels, got {vae}")
        return to_pixels
    if vae == "none":
        if pictures:
            raise ConfigError("vae must be a PATH or an ID for pictures, got none; --out x.npz takes latents")
        return functools.partial(_latents, scale=state.scale, shift=state.shift)
    try:
        autoencoder = open_autoencoder(
            vae, vae=state.vae, vae_source=state.vae_source, channels=int(state.model["in_channels"])
        )
    except ErdFastError as error:
        remedy = "name an autoencoder with --vae PATH|ID, or write latents with --vae none --out x.npz"
        raise type(error)(f"{error}; {remedy}") from error
    low, high = state.pixel_range
    return latent_decoder(autoencoder, state.scale, state.shift, (low, high))


def sample_run(
    path: Path,
    count: int,
    *,
    decode: Callable[[Tensor], Pixels | Latents] | None = None,
    classes: tuple[int, ...] = (),
    steps: int = 50,
    cfg_scale: float = 1.0,
    guidance_interval: GuidanceInterval | None = None,
    seed: int = 0,
    ema: bool = True,
) -> tuple[Pixels | Latents, NDArray[np.int64] | None]:
    """``count`` samples by the averaged weights (``ema``) of a run's newest checkpoint, or of the checkpoint ``path``.

    Args:
        decode: from :func:`open_decoder`; None is that of the recorded autoencoder.
        classes: labels to cycle through; none spreads over all classes.

    Returns:
        What ``decode`` gives, images (N, H, W, C) uint8 or latents; and labels (None for an unconditional model).

    Raises:
        ConfigError: count, classes or sampler settings are not allowed. DataError: no checkpoint there, or a damaged
            one. Without ``decode`` also what :func:`open_decoder` raises.
    """
    checkpoint = find_checkpoint(path)
    if count < 1:
        raise ConfigError(f"n: given {count}, allowed 1 or more")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed: given {seed}, allowed 0 to 2**64 - 1")
    state = load_state(checkpoint)
    decode = decode or open_decoder(checkpoint)
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
    return decode(samples), None if labels is None else labels.numpy()


def find_checkpoint(path: Path) -> Path:
    """``path`` if it is a checkpoint, else the newest one of the run ``path``. Raises DataError if there is none."""
    checkpoint = path if (path / "state.json").is_file() else latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise DataError(f"{path} is no checkpoint and no run with one (no state.json, no checkpoints/step-*)")
    return checkpoint


def _latents(samples: Tensor, scale: list[float], shift: list[float]) -> Latents:
    return to_latents(samples, scale, shift).numpy()


def _labels(count: int, classes: tuple[int, ...], num_classes: int) -> Tensor | None:
    for label in classes:
        if not 0 <= label < num_classes:
            allowed = f"0 to {num_classes - 1}" if num_classes else "none, the model is unconditional"
            raise ConfigError(f"classes: given {label}, allowed {allowed}")
    if not classes:
        return spread_labels(count, num_classes)
    return torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
