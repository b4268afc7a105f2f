"""Readers on a GPU: rows arrive whole however late they are used, and pinned memory is used again."""

from itertools import islice

import pytest
import torch

from erd_fast.data import LatentStore, open_reader, write_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"),
]
GPU = torch.device("cuda")
COUNT, SIZE = 2048, 256
_BUSY = 20_000_000  # cycles: about 10 ms, in which a reader is several batches ahead


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LatentStore:
    """Two shards, in which every number is that of its sample."""
    latents = torch.arange(float(COUNT))[:, None, None, None].expand(COUNT, 8, 32, 32).half()
    path = tmp_path_factory.mktemp("gpu") / "store"
    return write_store(path, [(latents, torch.arange(COUNT))], kind="mean_std", num_classes=COUNT, shard_size=1500)


@pytest.fixture(params=["mmap", "dali"])
def loader(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def _plan(number: int) -> torch.Tensor:
    return (torch.arange(SIZE) * 11 + 97 * number) % COUNT


def test_rows_are_right_when_the_gpu_is_late(store, loader):
    """Each batch is read when the host has long dropped it, and asked for later ones."""
    batches, sums = open_reader(store, loader, GPU).batches(_plan, 3), []
    for batch in islice(batches, 40):
        assert batch.latents.device.type == "cuda" and not batch.resident
        torch.cuda._sleep(_BUSY)
        sums.append((batch.latents.float().mean((1, 2, 3)), batch.labels.clone()))
        del batch
    torch.cuda.synchronize()
    batches.close()
    for number, (means, labels) in enumerate(sums, 3):
        assert torch.equal(means.long().cpu(), _plan(number)) and torch.equal(labels.cpu(), _plan(number))


def test_rows_are_right_on_another_stream(store, loader):
    batches, stream = open_reader(store, loader, GPU).batches(_plan, 0), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = [batch.labels.clone() for batch in islice(batches, 10)]
    stream.synchronize()
    batches.close()
    assert all(torch.equal(labels.cpu(), _plan(number)) for number, labels in enumerate(found))


def test_pinned_memory_is_made_once(store, monkeypatch):
    empty, pinned = torch.empty, []

    def counted(*shape, **how):
        if how.get("pin_memory"):
            pinned.append(shape)
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", counted)
    batches = open_reader(store, "mmap", GPU).batches(_plan, 0)
    list(islice(batches, 20))
    batches.close()
    assert len(pinned) == 4  # latents and labels, twice


def test_the_pipeline_of_dali_gives_batches_on_the_gpu(store):
    pytest.importorskip("nvidia.dali")
    from erd_fast.data.dali import DaliReader

    pipeline = DaliReader(store, GPU).pipeline(_plan, 2)
    for number in range(2, 8):
        latents, labels = (
            torch.from_dlpack(output.as_tensor()) for output in pipeline.run(torch.cuda.current_stream())
        )
        assert latents.is_cuda and torch.equal(latents[:, 0, 0, 0].long(), labels)
        assert torch.equal(labels.cpu(), _plan(number))
