"""Runs of the digits preset with kernels and in plain PyTorch learn alike: `make soak`, minutes on two cores."""

import dataclasses
import statistics

import pytest

from erd_fast.training.config import EvalConfig, ModelConfig
from erd_fast.training.loop import train
from erd_fast.training.presets import get_preset

STEPS, LAST, SEEDS = 300, 50, 3


@pytest.mark.soak
@pytest.mark.parametrize("model", ["DiT-tiny/2", "U-ViT-tiny"])
def test_the_last_losses_are_within_a_percent(tmp_path, training_lines, model):
    preset = get_preset("digits")
    for seed in range(SEEDS):
        often = {"steps": STEPS, "seed": seed, "log_every": 1, "sample_every": 0, "save_every": 0}
        means = {}
        for kernels in (True, False):
            config = dataclasses.replace(
                preset,
                train=dataclasses.replace(preset.train, **often),
                model=ModelConfig(model, kernels=kernels),
                eval=EvalConfig(images=0),
            )
            train(config, tmp_path / f"{kernels}-{seed}")
            lines = training_lines(tmp_path / f"{kernels}-{seed}")
            means[kernels] = statistics.fmean(line["loss"] for line in lines[-LAST:])
        print(f"{model}, seed {seed}: mean loss of the last {LAST} of {STEPS} steps {means}")
        assert means[True] == pytest.approx(means[False], rel=0.01)
