"""What a whole training step is measured on: the cases, and the problem that all variants of a case train on.

Latents of (4, 32, 32) in 1000 classes, of random numbers: stored as fp16 (mean, std) and resident on the device. The
target is v on the cosine schedule with the ERD weight.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erd_fast.benchmark.model_cases import random_model
from erd_fast.benchmark.op_cases import SCALE, SHAPE
from erd_fast.data import Batch, LatentStore, write_store
from erd_fast.data.loaders import ResidentReader
from erd_fast.diffusion import DiffusionProcess
from erd_fast.models import DiffusionModel
from erd_fast.ops import use_backend
from erd_fast.random import Purpose, Stream, normals
from erd_fast.training.build import computing, make_process, model_arguments
from erd_fast.training.config import DiffusionConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

BATCHES = {
    "DiT-XL/2": 128,
    "DiT-S/2": 256,
    "DiT-B/2": 256,
    "DiT-L/2": 128,
    "U-ViT-M/2": 128,
    "U-ViT-L/2": 128,
    "U-ViT-H/2": 64,
}
"""Images of a step on a GPU, by model."""
USUAL = ("DiT-XL/2", "DiT-S/2")
_ON_CPU = 8
_STORED = 4096  # samples
_CLASSES = 1000
_EMA_DECAY, _GRAD_CLIP = 0.99, 0.01  # at which the check sees average and clipping; their cost does not depend on it


@dataclasses.dataclass(frozen=True)
class StepCase:
    """Steps of ``size`` images, or of as many as a variant can take: then ``size`` is where the search begins."""

    model: ModelConfig
    size: int
    largest: bool = False
    usual: bool = True
    side: int = SHAPE[1]

    @property
    def group(self) -> str:
        return f"step/{self.model.name}"

    @property
    def name(self) -> str:
        return "largest batch" if self.largest else f"N={self.size}"


def step_cases(device: torch.device) -> list[StepCase]:
    """Every case that is measured on ``device``, what matters most first."""
    models = {name: ModelConfig(name) for name in BATCHES}
    if device.type == "cpu":
        digits = StepCase(ModelConfig("DiT-tiny/2"), 64, side=8)  # model, batch and images of the preset digits
        return [digits, *(StepCase(model, _ON_CPU, usual=name == "DiT-S/2") for name, model in models.items())]
    return [
        StepCase(models[name], size, largest, usual=name in USUAL)
        for largest in (False, True)
        for name, size in BATCHES.items()
    ]


class Draws(NamedTuple):
    """What a step was taken on, (N, ...) each."""

    sample_index: Tensor
    t_index: Tensor
    label_drop: Tensor
    posterior: Tensor
    noise: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the variants of a case have in common. ``config`` is that of ``erd-fast``."""

    config: RunConfig
    device: torch.device
    store: LatentStore
    batch: Batch
    process: DiffusionProcess

    def sized(self, size: int) -> "Problem":
        """The same with steps of ``size`` images."""
        train = dataclasses.replace(self.config.train, batch_size=size)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train))

    def model(self, config: RunConfig) -> DiffusionModel:
        """The model at its start, which is the same for every configuration."""
        how = {**model_arguments(config, self.store), **computing(config)}
        return random_model(device=self.device, **how)

    def labels(self, drawn: Draws) -> Tensor:
        """With the null label where a label was dropped."""
        return torch.where(drawn.label_drop, self.store.manifest.num_classes, self.batch.labels[drawn.sample_index])

    def drawn_by_definition(self, counter: int) -> Draws:
        """What the step draws that begins at ``counter`` images; worked out on the CPU, to spare a full GPU."""
        train, shape = self.config.train, self.store.manifest.shape
        with use_backend("reference"):
            drawn = self.process.draw(
                torch.tensor(counter),
                global_batch=train.batch_size,
                seed=train.seed,
                batch_size=train.batch_size,
                dataset_size=len(self.store),
                label_drop=train.label_drop,
            )
        posterior, noise = (
            normals(train.seed, Purpose.TRAIN, stream, drawn.ids, shape) for stream in (Stream.POSTERIOR, Stream.NOISE)
        )
        return Draws(drawn.sample_index, drawn.t_index, drawn.label_drop, posterior, noise)


def make_problem(case: StepCase, device: torch.device) -> Problem:
    config = RunConfig(
        train=TrainConfig(batch_size=case.size, precision="bf16" if device.type == "cuda" else "fp32"),
        model=case.model,
        diffusion=DiffusionConfig(target="v"),
        optim=OptimConfig(ema_decay=_EMA_DECAY, grad_clip=_GRAD_CLIP),
    )
    store, batch = _resident(device, case.side)
    return Problem(config, device, store, batch, make_process(config, device))


def _resident(device: torch.device, side: int) -> tuple[LatentStore, Batch]:
    """A store, of which nothing but the copy on the device is left."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(_STORED, 2 * SHAPE[0], side, side, generator=generator).half()
    labels = torch.randint(_CLASSES, (_STORED,), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        path, scale = Path(folder) / "store", (SCALE,) * SHAPE[0]
        store = write_store(path, [(latents, labels)], kind="mean_std", num_classes=_CLASSES, scale=scale)
        batches = ResidentReader(store, device).batches(lambda number: labels, 0)
        return store, next(batches)
