"""Pictures and scores of a run's averaged weights, during and after training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erd_fast.autoencoder import open_autoencoder
from erd_fast.data import LatentStore, Manifest
from erd_fast.evaluation import get_judge
from erd_fast.sampling.images import Decode, generate, latent_decoder, save, to_pixels
from erd_fast.training.config import RunConfig
from erd_fast.training.step import TrainStep

PREVIEW_IMAGES = 40
_COLUMNS = 10
_LARGEST_JUDGED, _FEWEST_JUDGED = 64, 100  # larger images need a larger network; fewer ones teach none


def spread_labels(count: int, num_classes: int) -> Tensor | None:
    """Labels for ``count`` samples, every class equally often or, with fewer samples, evenly spaced; None without
    classes."""
    if not num_classes:
        return None
    index = torch.arange(count)
    return index % num_classes if count >= num_classes else index * num_classes // count


def preview_decoder(manifest: Manifest) -> Decode | None:
    """The decoder of previews: :func:`to_pixels` for grey or RGB pixels; for latents the recorded autoencoder, from
    local files only; None for other pixels.

    Raises:
        ConfigError, DataError: the autoencoder is unavailable, see :func:`open_autoencoder`.
    """
    channels = manifest.shape[0]
    if manifest.kind == "pixels":
        return to_pixels if channels in (1, 3) else None
    autoencoder = open_autoencoder("", vae=manifest.vae, vae_source=manifest.vae_source, channels=channels)
    return latent_decoder(autoencoder, manifest.scale, manifest.shift, manifest.pixel_range)


def write_preview(config: RunConfig, step: TrainStep, store: LatentStore, decode: Decode, path: Path) -> None:
    """A grid of 40 samples, the same noise each time, so that pictures of one run can be compared."""
    labels = spread_labels(PREVIEW_IMAGES, store.manifest.num_classes)
    save(decode(_samples(config, step, labels, PREVIEW_IMAGES)), None, path, _COLUMNS)


def judge_samples(config: RunConfig, step: TrainStep, store: LatentStore) -> dict[str, float]:
    """``class_accuracy``, ``fd_classifier`` of ``eval.images`` samples, and what the judge itself reaches."""
    manifest, count = store.manifest, config.eval.images
    real = store.gather(torch.arange(len(store)))
    judge = get_judge(real, store.labels, manifest.num_classes, store.fingerprint)
    labels = spread_labels(count, manifest.num_classes)
    assert labels is not None
    pixels = to_pixels(_samples(config, step, labels, count))
    scores = judge.score(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)
    return {**scores, "judge_holdout_accuracy": judge.holdout_accuracy}


def why_not_judged(store: LatentStore) -> str | None:
    """Why :func:`judge_samples` does not apply to this store; None if it does."""
    manifest = store.manifest
    if manifest.kind != "pixels" or manifest.num_classes < 2:
        return "the judge is a classifier of pixels, and needs at least two classes"
    if max(manifest.shape[1:]) > _LARGEST_JUDGED or len(store) < _FEWEST_JUDGED:
        return (
            f"the judge is for images of up to {_LARGEST_JUDGED} pixels a side, and at least {_FEWEST_JUDGED} of them"
        )
    return None


def _samples(config: RunConfig, step: TrainStep, labels: Tensor | None, count: int) -> Tensor:
    how: dict[str, Any] = {"steps": config.eval.sampler_steps, "cfg_scale": config.eval.cfg_scale}
    process = step.process
    # Also of a model with low-precision parameters: the sampler's images are float32.
    with step.optimizer.swap_ema(), torch.autocast(step.device.type, step.dtype, enabled=step.dtype != torch.float32):
        return generate(step.model, process.schedule, process.target, labels, count, seed=config.train.seed, **how)
