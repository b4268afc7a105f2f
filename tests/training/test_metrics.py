"""metrics: the log, its last values, and the rates."""

import json

import pytest
import torch

from erd_fast.errors import DataError, RunError
from erd_fast.training import metrics
from erd_fast.training.metrics import RunLog, Speed, read_log

FIXED = {"world_size": 1, "local_batch": 16}


def test_lines_are_appended_and_the_last_values_kept(tmp_path):
    log = RunLog(tmp_path, FIXED)
    lines = [{"step": 1, "loss": 2.0}, {"event": "resume", "step": 1}, {"step": 2, "loss": 1.0}, {"step": 2, "fd": 3.0}]
    for line in lines:
        log.write(line)
    log.write_metrics()
    assert read_log(tmp_path / "log.jsonl") == lines
    expected = {"world_size": 1, "local_batch": 16, "step": 2, "loss": 1.0, "fd": 3.0}
    assert json.loads((tmp_path / "metrics.json").read_text()) == log.last == expected
    assert RunLog(tmp_path, FIXED).last == log.last


def test_cutting_back_drops_later_lines_and_a_half_line(tmp_path):
    log = RunLog(tmp_path, FIXED)
    for step in (2, 4, 6):
        log.write({"step": step})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 6]
    log.cut_back(4)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    log.write({"step": 5})
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 5]


def test_no_log_is_an_empty_one(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize("line", ["{", "3", '"step"', '{"loss": 1.0}', '{"step": "x"}', "\xff"])
def test_a_damaged_line_is_named_unless_it_is_the_last_half(tmp_path, line):
    good = json.dumps({"step": 1}) + "\n"
    (tmp_path / "log.jsonl").write_text(f"{good}{line}\n{good}", encoding="latin-1")
    with pytest.raises(DataError, match=r"log.jsonl, line 2: no log line"):
        RunLog(tmp_path, FIXED)


def test_cutting_back_takes_the_last_values_back_too(tmp_path):
    log = RunLog(tmp_path, FIXED)
    log.write({"step": 1, "loss": 2.0})
    log.write({"step": 2, "loss": 1.0, "class_accuracy": 0.5})
    assert log.has("class_accuracy", 2) and not log.has("class_accuracy", 1)
    log.cut_back(1)
    assert log.last == {**FIXED, "step": 1, "loss": 2.0}


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = RunLog(tmp_path, FIXED)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*log.jsonl"):
        log.write({"step": 1})


def test_rates_are_of_the_interval_without_its_pauses(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    speed = Speed(flops_per_image=10**9, device=torch.device("cpu"), precision="fp32")
    for _ in range(4):
        speed.count(32)
        speed.waited += 0.125
    clock[0] += 3.0
    speed.pause(1.0)
    # 128 images in 2 s; 3 forward passes' worth of FLOPs each; waited 0.5 s.
    expected = {"images_per_sec": 64.0, "step_ms": 500.0, "tflops": 0.192, "data_wait_pct": 25.0}
    assert speed.read() == expected
    speed.count(8)
    clock[0] += 1.0
    assert speed.read() == {"images_per_sec": 8.0, "step_ms": 1000.0, "tflops": 0.024, "data_wait_pct": 0.0}
