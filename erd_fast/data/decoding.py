"""Images of a collection as pixels, decoded by threads ahead of who asks for them."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.data.pictures import Pictures, decode

_LOOK_AHEAD = 3  # batches


class Decoded(NamedTuple):
    """Images of a batch, those that are broken left out."""

    images: list[int]  # their numbers within the collection
    pixels: Tensor  # (n, size, size, 3) uint8
    broken: list[tuple[str, str]]  # name, and what is wrong


class Decoder:
    """Cuts squares of ``size`` pixels out of the images of a collection, by ``workers`` threads; 0 is one for each
    core."""

    def __init__(self, pictures: Pictures, size: int, workers: int = 0):
        self._pictures, self._size = pictures, size
        self._pool = ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="decoder")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, images: range, size: int) -> Iterator[Decoded]:
        """Batches of ``size`` images, in order."""
        ahead: deque[tuple[range, list[Future[NDArray[np.uint8] | str]]]] = deque()
        for first in range(0, len(images), size):
            part = images[first : first + size]
            ahead.append((part, [self._pool.submit(self._decode, i) for i in part]))
            if len(ahead) > _LOOK_AHEAD:
                yield self._collected(*ahead.popleft())
        while ahead:
            yield self._collected(*ahead.popleft())

    def _decode(self, i: int) -> NDArray[np.uint8] | str:
        try:
            return decode(self._pictures.read(i), self._size)
        except Exception as error:  # whatever a reader or a decoder raises, one image is broken
            return " ".join(f"{error}".split()) or type(error).__name__

    def _collected(self, part: range, futures: list[Future[NDArray[np.uint8] | str]]) -> Decoded:
        found = [(i, future.result()) for i, future in zip(part, futures, strict=True)]
        kept = {i: pixels for i, pixels in found if not isinstance(pixels, str)}
        broken = [(self._pictures.names[i], reason) for i, reason in found if isinstance(reason, str)]
        whole = np.stack(list(kept.values())) if kept else np.empty((0, self._size, self._size, 3), np.uint8)
        return Decoded(list(kept), torch.from_numpy(whole), broken)
