"""info: what is installed, and why each backend runs or does not."""

import json
from pathlib import Path

import pytest
import torch

import erd_fast
from erd_fast import info, ops
from erd_fast.benchmark.records import checkout_commit
from erd_fast.ops import availability, use_backend

ROOT = Path(__file__).resolve().parent.parent


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


def words(text: str) -> str:
    return " ".join(text.split())


def check_text() -> str:
    """The text of info: short, with each op and each reason of one of its backends once. Returns it on one line."""
    facts, lines = info.collect(), info.describe().splitlines()
    assert len(lines) <= 25 and all(len(line) <= 120 for line in lines)
    text = words(info.describe())
    for name, states in facts["ops"].items():
        (line,) = [line for line in lines if line.split()[0] == name]
        available = [backend for backend, state in states.items() if state["available"]]
        assert available[0] == ops.OPS[name].available()[0].name and f"{name} {', '.join(available)}" in words(line)
        for backend in states.keys() & ops.OPS[name].backends:
            assert backend in line
            if not states[backend]["available"]:
                assert text.count(words(states[backend]["reason"])) == 1
        for backend in states.keys() - ops.OPS[name].backends:
            assert backend not in line.replace(name, "").replace(",", "").split()
            assert words(states[backend]["reason"]) not in text
    return text


def test_the_text_has_a_line_for_each_op_and_each_reason_once(monkeypatch):
    monkeypatch.delenv("ERD_FAST_BACKEND", raising=False)
    text, driver = check_text(), availability.driver_version()
    assert f"of the driver {availability.dotted(driver) if driver else 'none'})" in text
    if "cuda" in availability.extension()[0]:
        facts = availability.build_facts()
        assert f"CUDA kernels yes, for sm_{', sm_'.join(facts['archs'])} (CUDA {facts['toolkit'] // 1000}." in text
    if (ROOT / ".git").exists():
        assert f"(commit {checkout_commit()[0]}" in text


@pytest.mark.parametrize("compiled", [frozenset(), frozenset(["cpu"])])
def test_the_text_says_why_kernels_were_not_built(monkeypatch, compiled):
    monkeypatch.delenv("ERD_FAST_BACKEND", raising=False)
    monkeypatch.setattr(availability, "extension", lambda: (compiled, "no compiler was found"))
    for op in ops.OPS.values():
        monkeypatch.setattr(op, "_available", ())
    said = f"CPU kernels {'yes' if compiled else 'no'}; CUDA kernels no: no compiler was found; run pip install ."
    assert f"extension {said}" in check_text()


def test_the_text_shows_requests():
    with use_backend("reference,q_sample=flash"):
        described = info.describe()
    text = words(described)
    assert "draw reference, as requested; auto: " in text
    assert "q_sample flash, requested but unavailable; auto: " in text
    assert "q_sample=flash: q_sample has no flash backend; take one of cuda, triton, cpu, reference" in text
    assert len(described.splitlines()) <= 25


def test_a_package_in_site_packages_has_no_commit(monkeypatch):
    installed = ROOT / "docs" / "erd_fast" / "__init__.py"  # within a checkout, as site-packages of a .venv is
    monkeypatch.setattr(erd_fast, "__file__", str(installed))
    assert checkout_commit() == ("", None)
