"""Stages of a measurement: what fails, hangs or is killed costs only itself, and rows that were written stay."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from erd_fast.benchmark.stages import Rows, Runner, Stage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(tmp_path) -> Rows:
    return Rows(tmp_path / "rows.jsonl")


def stage(name: str, code: str, limit: float = 30.0) -> Stage:
    """Python ``code`` that has ``rows``."""
    given = "from erd_fast.benchmark.stages import Rows; from pathlib import Path; rows = Rows(Path('rows.jsonl'))\n"
    return Stage(name, [sys.executable, "-c", given + code], limit)


def run(rows: Rows, folder: Path, *groups: list[Stage], seconds: float = 60.0) -> dict[str, str]:
    """The outcome of each stage."""
    runner = Runner(rows, folder / "log.txt", seconds, folder, {"PYTHONPATH": str(ROOT)}, least=1.0)
    for group in groups:
        runner.run(*group)
    return {row["stage"]: row["outcome"] for row in rows.read("stage")}


HANGS = "import time; rows.write('x', stage=2); time.sleep(600)"
KILLED = "import os; rows.write('x', stage=3); os.kill(os.getpid(), 9)"


def test_a_stage_that_raises_hangs_or_is_killed_costs_only_itself(rows, tmp_path):
    found = run(
        rows,
        tmp_path,
        [stage("raises", "rows.write('x', stage=1); raise RuntimeError('bad kernel')")],
        [stage("hangs", HANGS, limit=2.0)],
        [stage("killed", KILLED)],
        [Stage("ended by itself", [sys.executable, "-c", "import sys; sys.exit(3)"], 30.0)],
        [stage("fine", "rows.write('x', stage=4); print('hello')")],
    )
    assert found == {
        "raises": "failed with exit status 1",
        "hangs": "killed at its limit of 2 s",
        "killed": "killed by SIGKILL",
        "ended by itself": "failed with exit status 3",
        "fine": "ok",
    }
    assert [row["stage"] for row in rows.read("x")] == [1, 2, 3, 4]
    log = (tmp_path / "log.txt").read_text()
    assert "bad kernel" in log and log.index("--- killed") < log.index("--- fine") < log.index("hello")


def test_what_a_stage_started_ends_with_it(rows, tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    noted = "rows.write('child', pid=p.pid)\n"
    run(
        rows,
        tmp_path,
        [stage("leaves it", child + noted)],
        [stage("hangs with it", child + noted + "p.wait()", limit=2.0)],
    )
    for row in rows.read("child"):
        assert is_gone(row["pid"])
    assert len(rows.read("child")) == 2


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # killed, and nobody has asked how it ended
            return True
        time.sleep(0.05)
    return False


def test_stages_of_a_group_run_at_the_same_time(rows, tmp_path):
    waits = "import time; began = time.time(); time.sleep(1); rows.write('x', began=began, ended=time.time())"
    run(rows, tmp_path, [stage("one", waits), stage("two", waits)])
    one, two = rows.read("x")
    assert max(one["began"], two["began"]) < min(one["ended"], two["ended"])


def test_no_stage_runs_when_the_time_is_over(rows, tmp_path):
    found = run(rows, tmp_path, [stage("hangs", HANGS)], [stage("late", "rows.write('late')")], seconds=3.0)
    assert found["late"] == "no time left" and not rows.read("late")
    assert re.fullmatch(r"killed at its limit of 3 s", found["hangs"])


def test_rows_take_numbers_that_are_not_finite_and_lose_a_line_cut_off(rows, tmp_path):
    rows.write("x", a=float("nan"), b=[1.0, float("inf")], c={"d": float("-inf")}, e=Path("f"))
    (row,) = rows.read()
    assert (row["a"], row["b"], row["c"], row["e"]) == (None, [1.0, None], {"d": None}, "f")
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"kind": "x", "half')
    assert rows.read("x") == [row] and rows.read("y") == []


def bench_gpu(out: Path, *arguments: str, **how: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "gpu", "--out", str(out), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=out.parent, **{**streams, **how})


def test_the_stages_of_a_gpu_leave_a_summary_and_a_result_that_tables_read(tmp_path):
    process = bench_gpu(tmp_path / "out", "--rehearse", "--only", "fp16", "--seconds", "100", "--commit", "0123abc")
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"rows.jsonl", "results.json", "summary.txt", "log.txt"}
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["stage"] for row in found["stages"]] == ["step erd-fast fp16"]
    assert [row["variant"] for row in found["records"]] == ["erd-fast fp16"]
    assert all(0 <= row["gradient_off"] < 0.1 and row["images_per_sec"] > 0 for row in found["records"])
    assert found["machine"] == {"commit": "0123abc", "dirty": None} and not found["unchecked"]
    # The row of a step is there before the check, which may fail or be killed.
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert kinds == ["record", "check", "stage"]
    assert (tmp_path / "out" / "summary.txt").read_text() in printed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_killed_at_any_moment_leaves_whole_rows_and_no_process(tmp_path, number):
    process = bench_gpu(tmp_path / "out", "--rehearse", "--only", "machine", "--seconds", "100")
    rows = Rows(tmp_path / "out" / "rows.jsonl")
    end = time.monotonic() + 60
    while len(rows.read("record")) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    stages = children(process.pid)
    process.send_signal(number)
    process.communicate()
    assert stages and all(map(is_gone, stages))
    assert len(rows.read("record")) >= 3 and process.returncode == (-9 if number == signal.SIGKILL else 128 + 15)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_without_a_gpu_and_with_a_wrong_name_it_says_what_to_do(tmp_path):
    without = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for arguments, said in (
        ([], "no CUDA device is visible to PyTorch; --rehearse runs the stages on a CPU"),
        (["--rehearse", "--only", "xl"], "--only must be part of a stage's name, got 'xl'; stages: extension, machine"),
    ):
        process = bench_gpu(tmp_path / "out", *arguments, env=without)
        assert said in " ".join(process.communicate()[0].split()) and process.returncode == 2
    assert not (tmp_path / "out").exists()
