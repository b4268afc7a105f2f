"""What tests of several areas share: a cache folder of their own, a run that trains in a fraction of a second, images
with an autoencoder.

The engine is imported where a fixture needs it: tests of ops and kernels run where its dependencies are not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from erd_fast.data import LatentStore
    from erd_fast.training.config import RunConfig
    from erd_fast.training.step import TrainStep


def pytest_configure(config: pytest.Config) -> None:
    """On a GPU torch, cuDNN and Inductor warn of things that no CPU shows: there warnings are printed, not errors."""
    if torch.cuda.is_available():
        config.addinivalue_line("filterwarnings", "default")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ERD_FAST_CACHE: one folder for the session, shared by its worker processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "erd-fast-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERD_FAST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def digits(cache: Path) -> LatentStore:
    from erd_fast.data import open_dataset

    return open_dataset("digits")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., RunConfig]:
    """``tiny(train={"steps": 3}, ...)``: the tiny run with these fields in place of its own."""
    from erd_fast.training import config

    base = config.RunConfig(
        train=config.TrainConfig(steps=6, batch_size=16, precision="fp32", log_every=1, save_every=0, sample_every=0),
        data=config.DataConfig("digits", "resident"),
        model=config.ModelConfig("DiT-tiny/2", hidden_size=32, depth=1, num_heads=1),
        diffusion=config.DiffusionConfig(),
        optim=config.OptimConfig(lr=1e-3, ema_decay=0.9),
        eval=config.EvalConfig(images=0, sampler_steps=2),
    )

    def make(**sections: dict[str, Any]) -> RunConfig:
        changed = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
        return dataclasses.replace(base, **changed)

    return make


@pytest.fixture(scope="session")
def training_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """``training_lines(folder)``: what a run logged of its training, less the times."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        names = ("step", "images", "loss", "grad_norm", "loss_by_t", "lr")
        return [{name: line[name] for name in names} for line in lines if "loss" in line]

    return read


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., RunConfig]) -> Path:
    """Folder of a finished run of 40 steps, long enough for labels to matter; tests leave it as it is."""
    from erd_fast.training.loop import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(train={"steps": 40}, optim={"lr": 1e-2}), folder)
    return folder


@pytest.fixture(scope="session")
def make_step(digits: LatentStore) -> Callable[..., TrainStep]:
    """``make_step(config, store=digits)``: a training step at its start, on the CPU."""
    from erd_fast.training.build import build_step

    def make(config: RunConfig, store: LatentStore = digits) -> TrainStep:
        return build_step(config, store, torch.device("cpu"))

    return make


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(n, act)``: call ``act`` within the n-th training step from now on."""
    from erd_fast.training.step import TrainStep

    def patch(number: int, act) -> None:
        compute, taken = TrainStep.compute, []

        def counted(self, batches):
            taken.append(None)
            if len(taken) == number:
                act()
            compute(self, batches)

        monkeypatch.setattr(TrainStep, "compute", counted)

    return patch


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images`` and ``vae``; tests leave them as they are."""
    from support.encoding import COUNT
    from support.pictures import image_folder, tiny_vae

    folder = tmp_path_factory.mktemp("given")
    image_folder(folder / "images", count=COUNT, side=40)
    tiny_vae(folder / "vae", size=32, count=COUNT)
    return folder


@pytest.fixture(scope="session")
def whole(given: Path) -> dict[str, bytes]:
    """The store ``given/whole`` that an undisturbed encoding makes."""
    from support.encoding import content, encode_given

    encode_given(given, given / "whole")
    assert not list(given.glob(".*"))
    return content(given / "whole")


@pytest.fixture(scope="session")
def latent_run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., RunConfig], given: Path, whole: dict[str, bytes]
) -> Path:
    """Folder of a finished run of 3 steps on the latents of ``given/whole``; tests leave it as it is."""
    from erd_fast.training.loop import train

    folder = tmp_path_factory.mktemp("latent") / "run"
    config = tiny(data={"path": str(given / "whole")}, train={"steps": 3, "sample_every": 2})
    train(config, folder)
    return folder
