"""A training step as one CUDA graph, launched by one call."""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from erd_fast.data import Batch
from erd_fast.errors import RunError
from erd_fast.numerics import is_out_of_memory
from erd_fast.training.step import TrainStep

_WARM_UP, _WARM_UP_REPLICATED = 3, 11
"""Steps taken eagerly before the capture: allocations and choices settle, and DistributedDataParallel wants eleven."""
_LEAD = 3
"""Steps that the host may be ahead of the device: enough to hide the host's work. More would keep a reader's batches in
the device's memory, and delay what the host does on a signal."""


class StepGraph:
    """Runs a step: eagerly at first, on a GPU then as a captured graph. The numbers are those of the eager step: random
    numbers, learning rate and counters are functions of what is on the device.

    Rows that a reader brings are copied to a staging buffer, from which the graph reads them. The optimizer's settings
    may change between steps.
    """

    def __init__(self, step: TrainStep):
        self._step = step
        on_gpu = step.device.type == "cuda"
        self._wanted = on_gpu and step.config.train.cuda_graph
        self._eager_left = _WARM_UP_REPLICATED if step.ranks.size > 1 else _WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ends: deque[torch.cuda.Event] = deque()  # of the steps that the device may not have taken yet
        self._staged: list[Batch] = []
        # What runs between replays does so on this stream and in this pool, so that memory serves both.
        self._stream = torch.cuda.Stream(step.device) if self._wanted else None
        self._pool = torch.cuda.MemPool() if self._wanted else None

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a graph."""
        return self._graph is not None

    def __call__(self, batches: Iterator[Batch]) -> Tensor:
        """Take a step on the next micro-batches. Returns the step's loss, see :class:`TrainStep`."""
        if len(self._ends) == _LEAD:
            self._ends.popleft().synchronize()
        given = [next(batches) for _ in range(self._step.micro_batches)]
        if not self._wanted:
            self._step.compute(given)
        elif self._graph is None:
            self._warm_up(given)
        else:
            self._stage(given)
            self._step.optimizer.refresh()
            self._graph.replay()
        if self._step.device.type == "cuda":
            end = torch.cuda.Event(blocking=True)  # the waiting thread leaves its core to the reader
            end.record(torch.cuda.current_stream(self._step.device))
            self._ends.append(end)
        return self._step.loss

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """What is allocated within this block, sampling for instance, takes the memory that the graph leaves free
        between two replays, and must be gone before the next one."""
        if self._stream is None or self._pool is None:
            yield
            return
        current = torch.cuda.current_stream(self._step.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            yield
        current.wait_stream(self._stream)

    def close(self) -> None:
        """Drop the graph, and with it the reductions that it holds."""
        if self._graph is not None:
            torch.cuda.synchronize(self._step.device)
            self._graph.reset()
            self._graph = None

    def _warm_up(self, batches: list[Batch]) -> None:
        if self._eager_left:
            with self.memory():
                self._step.compute(batches)
            self._eager_left -= 1
            return
        self._stage(batches)
        self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        assert self._pool is not None
        # Those of the last eager step: freed within the capture, their memory could not be given back.
        self._step.optimizer.zero_grad(set_to_none=True)
        try:
            # thread_local: a reader's thread may allocate pinned memory meanwhile.
            how: Any = {"pool": self._pool.id, "stream": self._stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **how):
                self._step.compute(self._staged)
        except RuntimeError as error:  # of which PyTorch does not recover
            if is_out_of_memory(error):
                raise
            raise RunError(f"the step cannot be captured as a CUDA graph: {error}; --train.cuda-graph off") from error
        self._step.optimizer.refresh()  # addresses of gradients are those of the capture
        return graph

    def _stage(self, batches: list[Batch]) -> None:
        """Copy rows to where the graph reads them; a resident store stays where it is."""
        if not self._staged:
            self._staged = [
                batch if batch.resident else Batch(batch.latents.clone(), batch.labels.clone(), False)
                for batch in batches
            ]
            return
        for staged, batch in zip(self._staged, batches, strict=True):
            if not batch.resident:
                staged.latents.copy_(batch.latents, non_blocking=True)
                staged.labels.copy_(batch.labels, non_blocking=True)
