"""One training step: draw, gather, q_sample, model, loss, backward, update."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from erd_fast.data import Batch, LatentStore
from erd_fast.diffusion import DiffusionProcess
from erd_fast.models import DiffusionModel
from erd_fast.numerics import PRECISION_DTYPES
from erd_fast.ops import Draw, Recording, record
from erd_fast.optim import AdamWEMA
from erd_fast.training.config import RunConfig
from erd_fast.training.distributed import Ranks, Reduction, check_shares, replicate

LOSS_BINS = 10


class TrainStep:
    """The step of one run, with what it must remember between two log lines.

    A model with fused ops holds the parameters of its products in the precision of the run, as copies of the
    optimizer's float32 masters, and runs without autocast; a plain one holds float32 and runs in autocast.

    Nothing in a step asks the device for a value, and all that it keeps stays at its address: see
    :class:`erd_fast.training.graph.StepGraph`.

    Attributes:
        counter: () int64 on the device, images seen.
        loss: () float32 on the device, this rank's share of the last step's mean loss.
        totals: sums since the last log line over the steps that were not skipped: ``loss`` float64 (), ``steps`` int64
            (), ``bin_sum`` and ``bin_count`` (10,).
        micro_batch: images of one forward pass on this rank.
    """

    def __init__(
        self,
        config: RunConfig,
        model: DiffusionModel,
        optimizer: AdamWEMA,
        process: DiffusionProcess,
        store: LatentStore,
        device: torch.device,
        ranks: Ranks,
    ):
        check_shares(config, ranks)
        self.config, self.model, self.optimizer, self.process = config, model, optimizer, process
        self.ranks, self.device = ranks, device
        manifest = store.manifest
        self._kind = manifest.kind
        self._scale = torch.tensor(manifest.scale, device=device) if manifest.scale else None
        self._shift = torch.tensor(manifest.shift, device=device) if manifest.shift else None
        self._mirror = manifest.flip == "mirror"
        self._num_classes = manifest.num_classes
        self._dataset_size = manifest.count
        self.micro_batch = config.train.micro_batch or config.train.batch_size // ranks.size
        self.micro_batches = config.train.batch_size // (ranks.size * self.micro_batch)
        self.dtype = PRECISION_DTYPES[config.train.precision]
        self._lowered = [p for p in model.parameters() if p.dtype != torch.float32]
        reduce_dtype = PRECISION_DTYPES[config.train.reduce_dtype]
        if self.micro_batches > 1 or (ranks.size > 1 and reduce_dtype == torch.float32):
            for parameter in self._lowered:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        self._reduction = Reduction(reduce_dtype, accumulated=self.micro_batches > 1)
        self._planned = Recording()  # of readers, which draw a step's indices ahead of it
        self._replica: DistributedDataParallel | None = None
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self._bins = torch.zeros(2, LOSS_BINS, device=device)
        self.totals = {
            "loss": torch.zeros((), dtype=torch.float64, device=device),
            "steps": torch.zeros((), dtype=torch.int64, device=device),
            "bin_sum": torch.zeros(LOSS_BINS, device=device),
            "bin_count": torch.zeros(LOSS_BINS, device=device),
        }

    def plan(self, number: int) -> Tensor:
        """Sample indices of micro-batch ``number`` of this rank, for readers that fetch ahead: (micro_batch,) on the
        CPU."""
        step, micro = divmod(number, self.micro_batches)
        images = torch.tensor(step * self.config.train.batch_size, dtype=torch.int64)
        with record(self._planned):
            return self._draw(images, micro).sample_index

    def __call__(self, batches: Iterator[Batch]) -> Tensor:
        """Take one step on the next micro-batches. Returns :attr:`loss`."""
        self.compute([next(batches) for _ in range(self.micro_batches)])
        return self.loss

    def compute(self, batches: list[Batch]) -> None:
        """The step on these micro-batches."""
        if self.ranks.size > 1 and self._replica is None:  # now, since every backward pass from here on must be its own
            self._replica = replicate(self.model, self.device, self._reduction)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.zero_()
        self._bins.zero_()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self._reducing(last):
                self._forward_backward(batch, number)
            self._accumulate(number, last)
        self.optimizer.step()
        self._count()

    def rehearse(self, images: int) -> None:
        """A forward and a backward pass on ``images`` empty images, which change nothing: libraries load their kernels,
        ops time their backends, and the allocator meets the sizes of a step."""
        side, channels = self.model.input_size, self.model.in_channels
        x = torch.zeros(images, channels, side, side, dtype=self.dtype, device=self.device)
        if self._patch:
            x = self.model.as_tokens(x)
        labels = torch.zeros(images, dtype=torch.int64, device=self.device) if self._num_classes else None
        with self.autocast():
            prediction = self.model(x, self.process.time[:1].expand(images), labels)
        torch.autograd.backward(prediction, torch.zeros_like(prediction))
        self.optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Low-precision products in a model whose parameters are float32."""
        if self._lowered or self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def _patch(self) -> int:
        return self.model.token_patch if self.model.kernels else 0

    def _forward_backward(self, batch: Batch, micro: int) -> None:
        decisions = self._draw(self.counter, micro)
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
            dtype=self.dtype,
            patch=self._patch,
        )
        labels = None
        if self._num_classes:
            labels = batch.labels[decisions.sample_index] if batch.resident else batch.labels
            labels = torch.where(decisions.label_drop, self._num_classes, labels)
        network = self.model if self._replica is None else self._replica
        with self.autocast():
            prediction = network(x_t, self.process.time[decisions.t_index], labels)
        result = self.process.loss(
            prediction.detach(),
            target,
            decisions.t_index,
            num_bins=LOSS_BINS,
            batch_size=self.config.train.batch_size,
            patch=self._patch,
            compute_grad=True,
            loss_scale=self.optimizer.loss_scale if self.config.train.precision == "fp16" else None,
        )
        torch.autograd.backward(prediction, result.dprediction)  # the loss has no graph of its own
        self.loss += result.loss
        self._bins[0] += result.bin_sum
        self._bins[1] += result.bin_count

    def _draw(self, counter: Tensor, micro: int) -> Draw:
        """The decisions of micro-batch ``micro``: ranks side by side in it."""
        train = self.config.train
        return self.process.draw(
            counter,
            global_batch=train.batch_size,
            seed=train.seed,
            batch_size=self.micro_batch,
            dataset_size=self._dataset_size,
            label_drop=train.label_drop,
            offset=(micro * self.ranks.size + self.ranks.rank) * self.micro_batch,
        )

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Gradients are summed over the ranks in the backward pass of the last micro-batch."""
        return contextlib.nullcontext() if last or self._replica is None else self._replica.no_sync()

    @torch.no_grad()
    def _accumulate(self, micro: int, last: bool) -> None:
        """Sum the gradients of low-precision parameters over micro-batches in float32."""
        if self._replica is not None and last:
            return  # done with the sum over ranks
        for parameter in self._lowered if self.micro_batches > 1 else ():
            assert parameter.grad is not None
            if micro == 0:
                parameter.main_grad.copy_(parameter.grad)  # type: ignore[attr-defined]
            else:
                parameter.main_grad += parameter.grad  # type: ignore[attr-defined]
            parameter.grad = None

    def _count(self) -> None:
        """Images and sums; a step that was skipped has no loss."""
        taken = self.optimizer.grad_norm.isfinite()
        nothing = torch.zeros_like(self._bins)
        bins = torch.where(taken, self._bins, nothing)
        self.totals["loss"] += torch.where(taken, self.loss, nothing[0, 0])
        self.totals["steps"] += taken
        self.totals["bin_sum"] += bins[0]
        self.totals["bin_count"] += bins[1]
        self.counter += self.config.train.batch_size

    def sum_totals(self) -> dict[str, Tensor]:
        """The totals over all ranks. Every rank has to call it."""
        names = [name for name in self.totals if name != "steps"]  # as many on every rank
        return {**self.totals, **dict(zip(names, self.ranks.sum([self.totals[n] for n in names]), strict=True))}

    def take_totals(self) -> tuple[float | None, list[float | None]]:
        """(mean loss, mean unweighted loss by timestep bin) over all ranks and steps since the last call, None where
        there is none. Reads the device, and every rank has to call it."""
        totals = self.sum_totals()
        loss = float(totals["loss"] / totals["steps"]) if totals["steps"] else None
        by_t = (totals["bin_sum"].double() / totals["bin_count"].double()).tolist()
        for total in self.totals.values():
            total.zero_()
        return loss, [None if math.isnan(value) else value for value in by_t]
