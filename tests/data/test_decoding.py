"""decoding: images come in order, and threads are ahead by so much and no more."""

import io
import threading
import time

import pytest
import torch
from PIL import Image

from erd_fast.data.decoding import Broken, decode_ahead, parts
from erd_fast.data.pictures import Pictures


def _collection(count: int, read=None) -> Pictures:
    """Images of one colour, which is their number."""

    def content(i: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (i, i, i)).save(file, format="png")
        return file.getvalue()

    return Pictures([f"{i}.png" for i in range(count)], [0] * count, None, (), read or content)


def _decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decoder")]


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_images_come_in_order_without_those_that_are_broken(workers):
    good = _collection(23).read
    pictures = _collection(23, lambda i: good(i) if i % 5 else b"")
    batches = list(decode_ahead(pictures, [*parts(range(23), 4), range(6, 8)], 2, workers=workers))
    assert [len(batch.numbers) + len(batch.broken) for batch in batches] == [4, 4, 4, 4, 4, 3, 2]
    numbers = [number for batch in batches for number in batch.numbers]
    assert numbers == [*(i for i in range(23) if i % 5), 6, 7]
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.shape == (len(numbers), 2, 2, 3) and pixels[:, 0, 0, 0].tolist() == numbers
    broken = [image for batch in batches for image in batch.broken]
    assert broken == [Broken(f"{i}.png", "no image of a known format") for i in range(0, 23, 5)]


@pytest.mark.parametrize(("size", "workers", "ahead"), [(4, 2, 12), (1, 4, 9), (32, 2, 96)])
def test_threads_are_ahead_by_two_batches_or_by_what_they_need(size, workers, ahead):
    asked: list[int] = []
    good = _collection(200).read
    pictures = _collection(200, lambda i: asked.append(i) or good(i))
    batches = decode_ahead(pictures, parts(range(200), size), 2, workers=workers)
    next(batches)
    until = time.monotonic() + 10
    while len(asked) < ahead and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)  # time for one too many
    assert sorted(asked) == list(range(ahead))
    batches.close()
    assert not _decoders()


def test_there_is_a_thread_for_each_core_that_torchrun_leaves(monkeypatch):
    together, threads = threading.Barrier(4, timeout=10), set()
    pictures = _collection(8, lambda i: threads.add(threading.get_ident()) or str(together.wait()).encode())
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(13)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    (batch,) = decode_ahead(pictures, [range(8)], 2)
    assert {image.reason for image in batch.broken} == {"no image of a known format"}  # and the barrier held
    assert len(threads) == 4


def test_what_was_asked_for_is_not_decoded_after_the_end():
    asked: list[int] = []
    pictures = _collection(200, lambda i: asked.append(i) or time.sleep(0.002))
    batches = decode_ahead(pictures, parts(range(200), 50), 2, workers=1)
    next(batches)
    batches.close()
    assert 50 <= len(asked) < 100  # of 150
