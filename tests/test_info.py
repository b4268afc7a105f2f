"""info: what is installed, and why each backend runs or does not."""

import json

import torch

import erd_fast
from erd_fast import info, ops


def test_every_op_and_backend_has_a_reason():
    facts = info.collect()["ops"]
    assert {"draw", "q_sample", "diffusion_loss"} <= facts.keys()
    for name, backends in facts.items():
        assert hasattr(ops, name)
        assert backends["reference"]["available"] is True
        for state in backends.values():
            assert state.keys() == {"available", "reason"}
            assert isinstance(state["available"], bool) and state["reason"]


def test_versions_folders_and_settings(monkeypatch, cache):
    monkeypatch.setenv("ERD_FAST_BACKEND", "reference")
    facts = info.collect()
    assert facts["erd_fast"] == erd_fast.__version__ and facts["packages"]["torch"] == torch.__version__.split("+")[0]
    assert facts["cache"] == str(cache)
    assert facts["environment"]["ERD_FAST_BACKEND"] == "reference"
    assert len(facts["gpus"]) == torch.cuda.device_count() * torch.cuda.is_available()
    assert json.loads(json.dumps(facts)) == facts


def test_a_package_that_is_missing_is_said_so(monkeypatch):
    monkeypatch.setattr(info, "_PACKAGES", ("torch", "no-such-package"))
    assert info.collect()["packages"]["no-such-package"] == "not installed"


def test_the_text_has_a_line_for_every_backend():
    lines = info.describe().splitlines()
    for name, backends in info.collect()["ops"].items():
        for backend, state in backends.items():
            (line,) = [line for line in lines if line.split()[:2] == [name, backend]]
            assert line.endswith(state["reason"])
