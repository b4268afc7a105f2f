"""One training step: draw, gather, q_sample, model, loss, backward, update."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from erd_fast.data import Batch, LatentStore
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.models import DiffusionModel
from erd_fast.ops import Draw
from erd_fast.optim import AdamWEMA
from erd_fast.training.config import RunConfig

LOSS_BINS = 10


class TrainStep:
    """The step of one run, with what it must remember between two log lines.

    Attributes:
        counter: () int64 on the device, images seen.
        totals: sums since the last log line: ``loss`` float64 (), ``steps`` int64 (), ``bin_sum`` and ``bin_count``
            (10,).
    """

    def __init__(
        self,
        config: RunConfig,
        model: DiffusionModel,
        optimizer: AdamWEMA,
        process: DiffusionProcess,
        store: LatentStore,
        device: torch.device,
    ):
        self.config, self.model, self.optimizer, self.process = config, model, optimizer, process
        manifest = store.manifest
        self._kind = manifest.kind
        self._scale = torch.tensor(manifest.scale, device=device) if manifest.scale else None
        self._shift = torch.tensor(manifest.shift, device=device) if manifest.shift else None
        self._mirror = manifest.flip == "mirror"
        self._num_classes = manifest.num_classes
        self._dataset_size = manifest.count
        self._device = device
        self.micro_batch = config.train.micro_batch or config.train.batch_size
        self.micro_batches = config.train.batch_size // self.micro_batch
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.totals = {
            "loss": torch.zeros((), dtype=torch.float64, device=device),
            "steps": torch.zeros((), dtype=torch.int64, device=device),
            "bin_sum": torch.zeros(LOSS_BINS, device=device),
            "bin_count": torch.zeros(LOSS_BINS, device=device),
        }

    def plan(self, number: int) -> Tensor:
        """Sample indices of micro-batch ``number`` of the run, for readers that fetch ahead: (micro_batch,) on the
        CPU."""
        images = torch.tensor(number * self.micro_batch, dtype=torch.int64)
        return self._draw(images, offset=0).sample_index

    def __call__(self, batches: Iterator[Batch]) -> Tensor:
        """Take one step on the next micro-batches. Returns the mean loss of the step, () float32 on the device."""
        train = self.config.train
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self._device)
        for micro in range(self.micro_batches):
            loss = loss + self._micro_batch(next(batches), offset=micro * self.micro_batch)
        self.optimizer.step()
        self.counter += train.batch_size
        self.totals["loss"] += loss
        self.totals["steps"] += 1
        return loss

    def _micro_batch(self, batch: Batch, offset: int) -> Tensor:
        decisions = self._draw(self.counter, offset)
        patch = self.model.token_patch if self.model.kernels else 0
        x_t, target = self.process.q_sample(
            batch.latents,
            decisions.t_index,
            index=decisions.sample_index if batch.resident else None,
            kind=self._kind,
            scale=self._scale,
            shift=self._shift,
            flip=decisions.flip if self._mirror else None,
            ids=decisions.ids,
            seed=self.config.train.seed,
            dtype=torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32,
            patch=patch,
        )
        labels = None
        if self._num_classes:
            labels = batch.labels[decisions.sample_index] if batch.resident else batch.labels
            labels = torch.where(decisions.label_drop, self._num_classes, labels)
        with autocast(self.config, self._device):
            prediction = self.model(x_t, self.process.time[decisions.t_index], labels)
        result = self.process.loss(
            prediction.detach(),
            target,
            decisions.t_index,
            num_bins=LOSS_BINS,
            batch_size=self.config.train.batch_size,
            patch=patch,
            compute_grad=True,
        )
        prediction.backward(result.dprediction)  # the loss has no graph of its own
        self.totals["bin_sum"] += result.bin_sum
        self.totals["bin_count"] += result.bin_count
        return result.loss

    def _draw(self, counter: Tensor, offset: int) -> Draw:
        train = self.config.train
        return self.process.draw(
            counter,
            global_batch=train.batch_size,
            seed=train.seed,
            batch_size=self.micro_batch,
            dataset_size=self._dataset_size,
            label_drop=train.label_drop,
            offset=offset,
        )

    def take_totals(self) -> tuple[float, list[float | None]]:
        """(mean loss, mean unweighted loss by timestep bin, None where empty) since the last call; reads the device."""
        loss = float(self.totals["loss"] / self.totals["steps"])
        by_t = (self.totals["bin_sum"].double() / self.totals["bin_count"].double()).tolist()
        for total in self.totals.values():
            total.zero_()
        return loss, [None if math.isnan(value) else value for value in by_t]


def make_process(config: RunConfig, device: torch.device | str = "cpu") -> DiffusionProcess:
    """The process that ``config.diffusion`` describes; its fields have the names of the arguments."""
    fields = dataclasses.asdict(config.diffusion)
    return DiffusionProcess(get_schedule(fields.pop("schedule")), **fields, device=device)


def autocast(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 matrix products for ``train.precision: bf16``; nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of step ``step`` = 0, 1, ...: linear warm-up, then constant or half a cosine to 0 at the end."""
    optim, steps = config.optim, config.train.steps
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup) / max(steps - optim.warmup, 1)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
