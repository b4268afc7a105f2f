"""Runs and kernels: what a run stores of its choices, and that kernels change numbers by their rounding alone."""

import json
import threading

import pytest
import torch

from erd_fast.errors import ConfigError
from erd_fast.ops import use_backend
from erd_fast.training.loop import train
from support.run_folders import terminate


def test_a_run_keeps_which_backends_it_took_and_goes_on_with_its_choices(tmp_path, tiny, at_step):
    config, file = tiny(), tmp_path / "run" / "kernels.json"
    at_step(3, terminate)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "run")
    stored = json.loads(file.read_text())
    assert {"draw", "q_sample", "diffusion_loss", "attention", "linear_gelu"} <= set(stored["used"])
    made = {"attention": {"float32[2, 3]": "triton"}}
    file.write_text(json.dumps({**stored, "choices": made}))
    train(config, tmp_path / "run")
    kept = json.loads(file.read_text())
    assert kept["device"] == stored["device"]
    assert kept["choices"]["attention"]["float32[2, 3]"] == "triton"


def test_choices_of_another_device_are_made_again(tmp_path, tiny, at_step):
    at_step(3, terminate)
    with pytest.raises(SystemExit):
        train(tiny(), tmp_path / "run")
    file = tmp_path / "run" / "kernels.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "device": "another", "choices": {"attention": {"float32[2, 3]": "triton"}}}))
    train(tiny(), tmp_path / "run")
    assert json.loads(file.read_text()) == stored


def test_a_requested_backend_reaches_the_thread_of_a_reader(tmp_path, tiny, caplog):
    """The mmap reader draws ahead in a thread of its own, which kernels.json leaves out."""
    with use_backend(draw="reference"), caplog.at_level("INFO", "erd_fast.ops"):
        train(tiny(data={"loader": "mmap"}), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "kernels.json").read_text())["used"]["draw"] == "reference"
    logged = {(line.threadName, *line.args) for line in caplog.records if line.msg == "%s runs on %s"}
    ran = {(thread, backend) for thread, op, backend in logged if op == "draw"}
    assert ran == {(threading.current_thread().name, "reference"), ("mmap-reader_0", "reference")}


def test_a_deterministic_run_chooses_nothing_by_time(tmp_path, tiny):
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        train(tiny(train={"deterministic": True}), tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert json.loads((tmp_path / "run" / "kernels.json").read_text())["choices"] == {}


def test_damaged_choices_are_named(tmp_path, tiny, at_step):
    at_step(3, terminate)
    with pytest.raises(SystemExit):
        train(tiny(), tmp_path / "run")
    (tmp_path / "run" / "kernels.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"kernels\.json: given \[1\], allowed what a run has written there"):
        train(tiny(), tmp_path / "run")


def test_plain_pytorch_and_kernels_train_alike_and_may_take_turns(tmp_path, tiny, training_lines, at_step):
    """The same losses within the percent that `make soak` holds longer runs to, and a run may change in the middle."""
    losses = {}
    for name in (True, False):
        train(tiny(model={"kernels": name}), tmp_path / f"kernels-{name}")
        used = json.loads((tmp_path / f"kernels-{name}" / "kernels.json").read_text())["used"]
        assert ("residual_ada_layer_norm" in used) == name
        losses[name] = [line["loss"] for line in training_lines(tmp_path / f"kernels-{name}")]
    at_step(3, terminate)
    with pytest.raises(SystemExit):
        train(tiny(), tmp_path / "turns")
    train(tiny(model={"kernels": False}), tmp_path / "turns")
    losses["turns"] = [line["loss"] for line in training_lines(tmp_path / "turns")]
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    assert losses["turns"] == pytest.approx(losses[False], rel=0.01)
