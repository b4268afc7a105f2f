"""What all readers have in common: plans, batches, and a thread that reads ahead."""

import contextvars
import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_LOOK_AHEAD = 2

Plan = Callable[[int], Tensor]
"""The (N,) sample indices of a batch, by its number, as a CPU tensor."""


class Batch(NamedTuple):
    """What a reader hands to a step."""

    latents: Tensor  # stored rows on the device: all of them if ``resident``, else those of this batch
    labels: Tensor  # int64, in the order of ``latents``
    resident: bool  # True: the step picks rows by the drawn sample index


class Reader(Protocol):
    """A source of batches."""

    name: str

    def batches(self, plan: Plan, start: int) -> Generator[Batch, None, None]:
        """Batches ``start``, ``start + 1``, ... without end."""
        ...


class Made(NamedTuple):
    """A batch as a reading thread leaves it: made on a stream of the thread's own, if on a GPU, where ``ready`` comes
    after it."""

    batch: Batch
    ready: torch.cuda.Event | None


def read_ahead(read: Callable[[int], Made], start: int, name: str) -> Generator[Batch, None, None]:
    """What ``read(start)``, ``read(start + 1)``, ... made, called by a thread before they are asked for, in a copy of
    the caller's context. What the current stream does from here on may use it."""
    context = contextvars.copy_context()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) as pool:
        ahead: deque[Future[Made]] = deque()
        try:
            for number in itertools.count(start):
                ahead.append(pool.submit(context.run, read, number))
                if len(ahead) > _LOOK_AHEAD:
                    yield _taken_over(*ahead.popleft().result())
        finally:
            for future in ahead:
                future.cancel()


def _taken_over(batch: Batch, ready: torch.cuda.Event | None) -> Batch:
    if ready is not None:
        current = torch.cuda.current_stream(batch.latents.device)
        current.wait_event(ready)
        for tensor in (batch.latents, batch.labels):
            tensor.record_stream(current)
    return batch
