"""Stages of a measurement: what fails, hangs or is killed costs only itself, and rows that were written stay."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erd_fast.benchmark.stages import Rows, Runner, Stage

pytestmark = pytest.mark.slow

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


def test_rows_take_numbers_that_are_not_finite_and_lose_only_a_line_cut_off(rows, tmp_path):
    rows.write("x", a=float("nan"), b=[1.0, float("inf")], c={"d": float("-inf")}, e=Path("f"))
    (row,) = rows.read()
    assert (row["a"], row["b"], row["c"], row["e"]) == (None, [1.0, None], {"d": None}, "f")
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"kind": "x", "half')
    assert rows.read("x") == [row] and rows.read("y") == []
    rows.write("y", after=1)
    rows.write("y", after=2)
    assert rows.read("x") == [row] and [found["after"] for found in rows.read("y")] == [1, 2]


def test_a_command_that_is_not_there_and_an_unnamed_signal_cost_only_their_stage(rows, tmp_path):
    found = run(
        rows,
        tmp_path,
        [Stage("missing", ["/nowhere/at/all"], 5.0), stage("concurrent", "rows.write('x')")],
        [stage("real time", "import os; os.kill(os.getpid(), 40)")],
    )
    assert found["missing"].startswith("did not start: ") and found["concurrent"] == "ok" and rows.read("x")
    assert found["real time"] == "killed by signal 40"


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
    assert [row["stage"] for row in found["stages"]] == ["extension", "step erd-fast fp16"]
    assert [row["variant"] for row in found["records"]] == ["erd-fast fp16"]
    assert all(0 <= row["gradient_off"] < 0.1 and row["images_per_sec"] > 0 for row in found["records"])
    assert found["machine"]["commit"] == "0123abc" and not found["unchecked"]
    # The row of a step is there before the check, which may fail or be killed.
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert kinds == ["machine", "extension", "stage", "record", "check", "stage"]
    assert (tmp_path / "out" / "summary.txt").read_text() in printed


RUNNER = """
import sys
from pathlib import Path
from erd_fast.benchmark.stages import Rows, Runner, Stage, stopped_by_signals
rows = Rows(Path("rows.jsonl"))
with stopped_by_signals():
    Runner(rows, Path("log.txt"), 600.0, Path()).run(Stage("hangs", sys.argv[1:], 600.0))
"""


def runner_of(folder: Path, *command: str) -> "subprocess.Popen[bytes]":
    """A process that runs one stage, which does not end by itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, *command],
        cwd=folder,
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_what_is_killed_leaves_whole_rows_and_no_process(rows, tmp_path, number, code):
    hangs = stage("hangs", "import os, time; [rows.write('x', pid=os.getpid()) for _ in range(3)]; time.sleep(600)")
    process = runner_of(tmp_path, *hangs.command)
    until(lambda: len(rows.read("x")) == 3)
    process.send_signal(number)
    assert process.wait(60) == code
    written = rows.read("x")
    assert len(written) == 3 and is_gone(written[0]["pid"])


def test_a_stage_ends_with_its_runner_however_early_that_is(tmp_path):
    """Python takes seconds to import torch, in which nothing of a stage's own code has run."""
    process = runner_of(tmp_path, "sleep", "600")
    until(lambda: bool(children(process.pid)))
    stages = children(process.pid)
    process.kill()
    process.wait(60)
    assert stages and all(map(is_gone, stages))


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there() and time.monotonic() < end:
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_results_that_are_there_are_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.jsonl").write_text('{"kind": "record"}\n')
    process = bench_gpu(tmp_path / "out", "--rehearse", "--only", "machine")
    said = " ".join(process.communicate()[0].split())
    assert process.returncode == 2 and "--out must be a folder without results, got" in said
    assert (tmp_path / "out" / "rows.jsonl").read_text() == '{"kind": "record"}\n'


def test_without_a_gpu_and_with_a_wrong_name_it_says_what_to_do(tmp_path):
    without = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for arguments, said in (
        ([], "no CUDA device is visible to PyTorch; --rehearse runs the stages on a CPU"),
        (["--rehearse", "--only", "xl"], "--only must be part of a stage's name, got 'xl'; stages: extension, machine"),
        (["--rehearse", "--seconds", "-5"], "--seconds must be above 0, got -5.0"),
    ):
        process = bench_gpu(tmp_path / "out", *arguments, env=without)
        assert said in " ".join(process.communicate()[0].split()) and process.returncode == 2
    assert not (tmp_path / "out").exists()
