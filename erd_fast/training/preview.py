"""Pictures and scores of a run's averaged weights, during and after training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erd_fast.data import LatentStore
from erd_fast.evaluation import get_judge
from erd_fast.sampling.images import generate, save, to_pixels
from erd_fast.training.config import RunConfig
from erd_fast.training.step import TrainStep, autocast

PREVIEW_IMAGES = 40
_COLUMNS = 10


def spread_labels(count: int, num_classes: int) -> Tensor | None:
    """Labels for ``count`` samples, every class equally often or, with fewer samples, evenly spaced; None without
    classes."""
    if not num_classes:
        return None
    index = torch.arange(count)
    return index % num_classes if count >= num_classes else index * num_classes // count


def write_preview(config: RunConfig, step: TrainStep, store: LatentStore, path: Path) -> None:
    """A grid of 40 samples, the same noise each time, so that pictures of one run can be compared."""
    labels = spread_labels(PREVIEW_IMAGES, store.manifest.num_classes)
    save(to_pixels(_samples(config, step, labels, PREVIEW_IMAGES)), None, path, _COLUMNS)


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


def can_judge(store: LatentStore) -> bool:
    """Whether :func:`judge_samples` applies: pixels with classes."""
    return store.manifest.kind == "pixels" and store.manifest.num_classes > 0


def _samples(config: RunConfig, step: TrainStep, labels: Tensor | None, count: int) -> Tensor:
    how: dict[str, Any] = {"steps": config.eval.sampler_steps, "cfg_scale": config.eval.cfg_scale}
    process = step.process
    with step.optimizer.swap_ema(), autocast(config, step.counter.device):
        return generate(step.model, process.schedule, process.target, labels, count, seed=config.train.seed, **how)
