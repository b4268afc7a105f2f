"""Images of a collection in batches, decoded ahead by several threads."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erd_fast.data.pictures import Pictures, decode
from erd_fast.torchrun import own_place

_LOOK_AHEAD = 2  # batches at least


class Broken(NamedTuple):
    """An image that cannot be read or decoded."""

    name: str
    reason: str


class Decoded(NamedTuple):
    """A range of a collection."""

    numbers: list[int]
    """Of the images that are not broken."""
    pixels: Tensor
    """(len(numbers), size, size, 3) uint8, RGB."""
    broken: list[Broken]


def parts(whole: range, size: int) -> Iterator[range]:
    for first in range(0, len(whole), size):
        yield whole[first : first + size]


def decode_ahead(
    pictures: Pictures, ranges: Iterable[range], size: int, *, workers: int = 0, pin: bool = False
) -> Generator[Decoded, None, None]:
    """What is in each of ``ranges``, in order, cut to ``size`` x ``size`` pixels.

    ``workers`` threads are ahead of the consumer by two batches, or by more if that would leave some of them idle; 0 is
    one for each core of this process. ``pin``: into pinned memory, from which a GPU copies by itself.
    """
    workers = workers or _own_cores()
    held: deque[tuple[range, list[Future[NDArray[np.uint8] | Broken]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decoder") as pool:
        try:
            for part in ranges:
                held.append((part, [pool.submit(_decoded, pictures, number, size) for number in part]))
                if len(held) > _LOOK_AHEAD and sum(len(later) for later, _ in held) - len(held[0][0]) >= 2 * workers:
                    yield _batch(*held.popleft(), size, pin)
            while held:
                yield _batch(*held.popleft(), size, pin)
        finally:
            pool.shutdown(cancel_futures=True)


def _own_cores() -> int:
    """Of the cores that this process may use, those that it need not leave to the others that torchrun started."""
    return max(1, len(os.sched_getaffinity(0)) // own_place().local_size)


def _decoded(pictures: Pictures, number: int, size: int) -> NDArray[np.uint8] | Broken:
    try:
        return decode(pictures.read(number), size)
    except Exception as error:  # damage makes Pillow, its plugins and archives raise nearly anything
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Broken(pictures.names[number], " ".join(text.split()) or type(error).__name__)


def _batch(part: range, made: list[Future[NDArray[np.uint8] | Broken]], size: int, pin: bool) -> Decoded:
    results = [future.result() for future in made]
    broken = [result for result in results if isinstance(result, Broken)]
    good = [(number, image) for number, image in zip(part, results, strict=True) if not isinstance(image, Broken)]
    pixels = torch.empty((len(good), size, size, 3), dtype=torch.uint8, pin_memory=pin)
    if good:
        np.stack([image for _, image in good], out=pixels.numpy())
    return Decoded([number for number, _ in good], pixels, broken)
