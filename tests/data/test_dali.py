"""dali: the pipeline itself, and its checkpoints."""

import sys

import pytest
import torch

from erd_fast.data import LatentStore, open_reader, write_store
from erd_fast.data.dali import DaliReader
from erd_fast.errors import ConfigError
from erd_fast.training.loop import train

CPU = torch.device("cpu")
COUNT = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LatentStore:
    latents = torch.arange(float(COUNT))[:, None, None, None].expand(COUNT, 1, 2, 2).bfloat16()
    path = tmp_path_factory.mktemp("dali") / "store"
    return write_store(path, [(latents, torch.arange(COUNT) % 7)], kind="sample", num_classes=7, shard_size=15)


def _plan(number: int) -> torch.Tensor:
    return (torch.arange(4) * 11 + number) % COUNT


def _run(pipeline) -> tuple[list[float], list[int]]:
    latents, labels = (torch.from_dlpack(output.as_tensor()) for output in pipeline.run())
    return latents.view(torch.bfloat16)[:, 0, 0, 0].tolist(), labels.tolist()


def _expected(number: int) -> tuple[list[float], list[int]]:
    return _plan(number).tolist(), (_plan(number) % 7).tolist()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_checkpoint_of_the_pipeline_is_a_start_at_its_batch(store, taken):
    reader = DaliReader(store, CPU)
    pipeline = reader.pipeline(_plan, 5)
    assert [_run(pipeline) for _ in range(taken)] == [_expected(5 + number) for number in range(taken)]
    restored = reader.pipeline(_plan, 5, checkpoint=pipeline.checkpoint())
    anew = reader.pipeline(_plan, 5 + taken)
    for number in range(5 + taken, 10 + taken):
        assert _run(restored) == _run(anew) == _expected(number)


def test_a_run_with_dali_is_the_run_without(tmp_path, tiny, training_lines):
    for loader in ("resident", "dali"):
        train(tiny(train={"steps": 3}, data={"loader": loader}), tmp_path / loader)
    assert training_lines(tmp_path / "dali") == training_lines(tmp_path / "resident")


def test_without_the_package_the_extra_is_named(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r": nvidia.dali is not installed: pip install 'erd-fast\[dali\]'"):
        open_reader(store, "dali", CPU)
