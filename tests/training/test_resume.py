"""Resuming: the rest of a run is the same, however and wherever it stopped."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from erd_fast.data import write_store
from erd_fast.errors import DataError, RunError
from erd_fast.training.config import config_text, load_config
from erd_fast.training.loop import train
from support.run_folders import Killed, checkpoints, die, events, same_weights, terminate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("log_every", "stop"), [(1, 1), (1, 5), (4, 3), (4, 4), (4, 5), (4, 11)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, tiny, training_lines, at_step, capsys, log_every, stop):
    config = tiny(train={"steps": 12, "log_every": log_every}, optim={"warmup": 6, "schedule": "cosine"})
    train(config, tmp_path / "whole")
    at_step(stop, terminate)
    with pytest.raises(SystemExit) as stopped:
        train(config, tmp_path / "parts")
    assert stopped.value.code == 143
    assert checkpoints(tmp_path / "parts") == [stop]
    assert f"stopped at step {stop}; the same command goes on from there" in capsys.readouterr().out
    train(config, tmp_path / "parts")
    assert f"resuming at step {stop}\n" in capsys.readouterr().out
    assert events(tmp_path / "parts") == [("resume", stop), ("end", 12)]
    assert training_lines(tmp_path / "parts") == training_lines(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 12)


@pytest.mark.parametrize("kill", [3, 5, 8, 10])
def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path, tiny, training_lines, at_step, kill):
    config = tiny(train={"steps": 11, "save_every": 4})
    train(config, tmp_path / "whole")
    at_step(kill, die)
    with pytest.raises(Killed):
        train(config, tmp_path / "parts")
    left = tmp_path / "parts" / "checkpoints" / ".step-00000012.x.partial"
    left.mkdir(parents=True)
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    begin = (kill - 1) // 4 * 4
    at_step(1, lambda: seen.append((tmp_path / "parts" / "log.jsonl").read_text()))
    seen: list[str] = []
    train(config, tmp_path / "parts")
    assert not left.exists()
    assert [json.loads(line)["step"] for line in seen[0].splitlines()] == [*range(1, begin + 1), *[begin] * (begin > 0)]
    assert events(tmp_path / "parts") == [("resume", begin)] * (begin > 0) + [("end", 11)]
    assert training_lines(tmp_path / "parts") == training_lines(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 11)


def _start(folder: Path, config: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "erd_fast.cli", "train", "digits", "--config", config, "--out", folder]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def _read_to(process: "subprocess.Popen[str]", step: int) -> str:
    """What the process prints up to the line of ``step`` or a later one."""
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
            return text
    pytest.fail(f"ended before step {step}: {text}{process.stderr.read()}")


def test_a_process_that_is_terminated_and_then_killed_goes_on_bit_for_bit(tmp_path, tiny, training_lines, digits):
    endless = tiny(train={"steps": 10**6, "save_every": 7})
    (tmp_path / "endless.yaml").write_text(config_text(endless))
    folder = tmp_path / "parts"

    first = _start(folder, tmp_path / "endless.yaml")
    _read_to(first, 5)
    first.send_signal(signal.SIGTERM)
    out, error = first.communicate(timeout=60)
    assert first.returncode == 143 and error == ""
    stopped = max(checkpoints(folder))
    assert f"stopped at step {stopped};" in out
    assert training_lines(folder)[-1]["step"] == stopped >= 5

    second = _start(folder, tmp_path / "endless.yaml")
    assert f"resuming at step {stopped}\n" in _read_to(second, stopped + 10)
    time.sleep(0.03)  # anywhere: in a step, in a save
    second.kill()
    second.communicate(timeout=60)
    assert second.returncode == -signal.SIGKILL
    killed = max(_checkpoints_whole(folder))
    assert killed > stopped

    steps = killed + 9
    train(tiny(train={"steps": steps}), folder)
    train(tiny(train={"steps": steps}), tmp_path / "whole")
    assert events(folder) == [("resume", stopped), ("resume", killed), ("end", steps)]
    assert training_lines(folder) == training_lines(tmp_path / "whole")
    assert same_weights(folder, tmp_path / "whole", steps)


def _checkpoints_whole(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")]


def test_a_finished_run_says_so_and_is_left_as_it_is(tmp_path, tiny, capsys):
    result = train(tiny(), tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    capsys.readouterr()
    for steps in (6, 4):
        assert train(tiny(train={"steps": steps}), tmp_path / "run") == result
        said = f"{tmp_path / 'run'} is finished: step 6 of {steps}; raise --train.steps to go on\n"
        assert capsys.readouterr().out == said
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
    assert checkpoints(tmp_path / "run") == [6]


def test_more_steps_go_on_from_a_finished_run(tmp_path, tiny, training_lines):
    train(tiny(), tmp_path / "parts")
    for steps in (9, 12):
        train(tiny(train={"steps": steps}), tmp_path / "parts")
    train(tiny(train={"steps": 12}), tmp_path / "whole")
    assert events(tmp_path / "parts") == [("end", 6), ("resume", 6), ("end", 9), ("resume", 9), ("end", 12)]
    assert training_lines(tmp_path / "parts") == training_lines(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 12)


def test_a_run_goes_on_with_other_micro_batches_reader_and_place_of_the_data(
    tmp_path, tiny, digits, training_lines, at_step
):
    shutil.copytree(digits.path, tmp_path / "copy")
    at_step(5, terminate)
    with pytest.raises(SystemExit):
        train(tiny(train={"steps": 12}), tmp_path / "parts")
    changed = tiny(train={"steps": 12, "micro_batch": 4}, data={"path": str(tmp_path / "copy"), "loader": "mmap"})
    train(changed, tmp_path / "parts")
    train(tiny(train={"steps": 12}), tmp_path / "whole")
    parts, whole = training_lines(tmp_path / "parts"), training_lines(tmp_path / "whole")
    assert parts[:5] == whole[:5]
    rounding = 2**-23 * math.sqrt(16 * 64)  # of a mean over as many terms, summed in another order
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=rounding)
    assert load_config(tmp_path / "parts" / "config.yaml") == changed


def test_fewer_steps_than_a_stopped_run_has_taken_change_nothing(tmp_path, tiny, at_step, capsys):
    at_step(5, terminate)
    with pytest.raises(SystemExit):
        train(tiny(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(tiny(train={"steps": 3}), tmp_path / "run")
    assert "is at step 5, past train.steps 3; nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_other_data_are_refused(tmp_path, tiny, digits, at_step):
    at_step(2, terminate)
    with pytest.raises(SystemExit):
        train(tiny(), tmp_path / "run")
    pixels = digits.gather(torch.arange(len(digits))).clone()
    pixels[1796, 0, 7, 7] ^= 1
    other = write_store(tmp_path / "other", [(pixels, digits.labels)], kind="pixels", num_classes=10)
    with pytest.raises(RunError) as refused:
        train(tiny(data={"path": str(other.path)}), tmp_path / "run")
    assert digits.fingerprint in str(refused.value) and other.fingerprint in str(refused.value)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "ema.safetensors", "training.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, trained, tiny, name):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000040" / name
    os.truncate(file, 50)
    with pytest.raises(DataError, match=str(file)):
        train(tiny(train={"steps": 41}, optim={"lr": 1e-2}), tmp_path / "run")
