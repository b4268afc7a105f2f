"""Reading a store through NVIDIA DALI: a pipeline whose source is the mapped shards."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.data.reading import Batch, Made, Plan, read_ahead
from erd_fast.data.store import LatentStore
from erd_fast.extras import load

CARRIED = {torch.float16: "FLOAT16", torch.bfloat16: "INT16", torch.float32: "FLOAT", torch.uint8: "UINT8"}
"""DALI's name of what carries a dtype: it has no bfloat16, so 16 bits of another name take its place."""

Rows = tuple[NDArray[Any], NDArray[Any]]
"""Latents and labels of a batch, as a source gives them to DALI."""


class DaliReader:
    """Rows copied from the mapped shards, and brought to the device, by a pipeline of NVIDIA DALI, which a thread runs
    ahead. Without a GPU the pipeline has CPU operators alone.

    Raises:
        ConfigError: NVIDIA DALI is not installed.
    """

    name = "dali"

    def __init__(self, store: LatentStore, device: torch.device):
        self._dali = load("nvidia.dali", "dali", "data.loader dali")
        self._store, self._device = store, device
        self._dtype = next(store.shards()).dtype

    def batches(self, plan: Plan, start: int) -> Generator[Batch, None, None]:
        failed: list[Exception] = []

        def source(number: int) -> Rows:
            try:
                return self._rows(plan(start + number))
            except Exception as error:  # DALI asks early: first come the batches before this one
                failed.append(error)
                raise StopIteration from None

        def read(number: int) -> Made:
            try:
                return self._read(pipeline, stream)
            except StopIteration:
                raise failed[0] from None

        pipeline = self._pipeline(source, len(plan(start)), None)
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        return read_ahead(read, start, "dali-reader")

    def pipeline(self, plan: Plan, start: int = 0, checkpoint: bytes | None = None) -> Any:
        """The pipeline, for a trainer of your own. Each ``run()`` gives (latents, labels) of the next batch, bfloat16
        as int16, and copies the rows of a later one; ``checkpoint()`` gives its position.

        Args:
            plan: as of :meth:`batches`, with as many samples in each batch.
            start: number of the first batch.
            checkpoint: what a pipeline of this plan and start gave; goes on from there.

        Returns:
            An ``nvidia.dali.Pipeline``.
        """
        return self._pipeline(lambda number: self._rows(plan(start + number)), len(plan(start)), checkpoint)

    def _pipeline(self, source: Callable[[int], Rows], size: int, checkpoint: bytes | None) -> Any:
        dali, on_gpu = self._dali, self._device.type == "cuda"
        carried = [getattr(dali.types, CARRIED[self._dtype]), dali.types.INT64]
        pipeline = dali.Pipeline(**pipeline_settings(size, self._device, checkpoint))
        with pipeline:
            rows = dali.fn.external_source(source, num_outputs=2, batch=True, dtype=carried, ndim=[3, 0])
            pipeline.set_outputs(*(output.gpu() if on_gpu else output for output in rows))
        return pipeline

    def _rows(self, index: Tensor) -> Rows:
        latents = self._store.gather(index)
        if self._dtype == torch.bfloat16:
            latents = latents.view(torch.int16)
        return latents.numpy(), self._store.labels[index].numpy()

    def _read(self, pipeline: Any, stream: torch.cuda.Stream | None) -> Made:
        if stream is None:
            return Made(self._batch(pipeline.run()), None)
        with torch.cuda.stream(stream):  # on which DALI takes its memory back, so the batch gets a copy
            batch = self._batch(pipeline.run(stream))
            return Made(Batch(batch.latents.clone(), batch.labels.clone(), False), stream.record_event())

    def _batch(self, outputs: Sequence[Any]) -> Batch:
        latents, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        return Batch(latents.view(self._dtype), labels, False)


def pipeline_settings(size: int, device: torch.device, checkpoint: bytes | None) -> dict[str, Any]:
    """Of a pipeline on ``device``, in batches of ``size``, that goes on from ``checkpoint`` if there is one."""
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return {
        "batch_size": size,
        "num_threads": 1,
        "device_id": index,
        "enable_checkpointing": True,
        "checkpoint": checkpoint,
    }
