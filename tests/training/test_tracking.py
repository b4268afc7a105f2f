"""tracking: metrics in TensorBoard and Weights & Biases, by the real packages."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from erd_fast.errors import ConfigError
from erd_fast.training.loop import train
from erd_fast.training.tracking import open_tracker


def test_tensorboard_has_what_the_log_has(tmp_path, tiny, training_lines):
    folder = tmp_path / "run"
    train(tiny(train={"track": "tensorboard"}), folder)
    lines = training_lines(folder)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in lines]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert events.Scalars("loss_by_t/0") and events.Scalars("images_per_sec")


def test_wandb_runs_offline_and_goes_on_under_one_id(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    train(tiny(train={"track": "wandb", "steps": 2}), folder)
    name = (folder / "wandb-id").read_text()
    train(tiny(train={"track": "wandb", "steps": 4}), folder)
    assert (folder / "wandb-id").read_text() == name
    runs = list((folder / "wandb").glob(f"offline-run-*-{name}"))
    assert len(runs) == 2 and all(list(run.glob("*.wandb")) for run in runs)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"train.track wandb: wandb is not installed: pip install 'erd-fast\[track\]'"
    ):
        open_tracker("wandb", tmp_path, {})


def test_without_a_tracker_nothing_is_written(tmp_path, tiny):
    train(tiny(train={"steps": 1}), tmp_path / "run")
    assert not {"wandb", "tensorboard", "wandb-id"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 1
