"""torchrun: a process's place among others, and its device."""

import pytest
import torch

from erd_fast.errors import ConfigError
from erd_fast.torchrun import own_device, own_place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_a_process_is_alone_unless_torchrun_says_otherwise(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert own_place() == (0, 1, 0, 1)
    for name, value in zip(NAMES, "5812", strict=True):
        monkeypatch.setenv(name, value)
    place = own_place()
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 8, 1, 2)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == torch.device("cpu") and not taken
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in zip(NAMES, "1313", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == torch.device("cuda", 1) and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"^nproc-per-node: given 3, allowed up to 2, the GPUs of this machine$"):
        own_device()
