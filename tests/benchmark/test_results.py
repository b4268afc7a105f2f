"""bench/tables.py and bench/gpu.py: tables of the documents, and the results of stages."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from erd_fast.benchmark.stages import Rows
from erd_fast.ops import OPS, DiffusionLoss

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "device": "GPU X",
    "threads": 4,
    "driver": "580.1",
    "torch": "2.14.1",
    "triton": "3.8.0",
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-11-25T10:00:00+00:00",
}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return bench_module("tables")


def bench_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(group: str, case: str, variant: str, backend: str, seconds: float, rate: float) -> dict[str, object]:
    names = {"group": group, "case": case, "variant": variant, "backend": backend}
    return {**names, "median_s": seconds, "iqr_s": seconds / 100, "runs": 9, "gb_per_s": rate}


RECORDS = [
    record("machine", "copy", "eager", "", 1e-3, 2000.0),
    record("ops/q_sample", "drawn N=8", "eager", "", 40e-6, 50.0),
    record("ops/q_sample", "drawn N=8", "erd-fast", "cuda", 8e-6, 250.0),
    record("ops/q_sample", "drawn N=8", "erd-fast", "triton", 10e-6, 200.0),
    record("ops/q_sample", "drawn N=8192", "eager", "", 4e-3, 250.0),
    record("ops/q_sample", "drawn N=8192", "compile", "", 3e-3, 300.0),
    record("ops/q_sample", "drawn N=8192", "erd-fast", "cuda", 0.5e-3, 1800.0),
]
RESULTS = {"gpu-x/ops.json": {"machine": MACHINE, "records": RECORDS}}
EXPECTED = """<!-- table: ops/q_sample -->
**GPU X**, torch 2.14.1, Triton 3.8.0, commit 0123456, 2026-11-25 (bench/results/gpu-x/ops.json)

| case | eager | compile | erd-fast cuda | erd-fast triton | x eager | x compile | GB/s | of copy |
| --- | --: | --: | --: | --: | --: | --: | --: | --: |
| drawn N=8 | 40 µs (0.4) |  | 8 µs (0.08) | 10 µs (0.1) | 5.00 |  | 250 | 12% |
| drawn N=8192 | 4 ms (0.04) | 3 ms (0.03) | 500 µs (5) |  | 8.00 | 6.00 | 1800 | 90% |
<!-- end -->
"""


def test_a_region_becomes_the_table_and_the_rest_stays(tables):
    empty = "before\n<!-- table: ops/q_sample -->\n<!-- end -->\nafter <!-- end -->\n"
    written = tables.render(empty, RESULTS)
    assert written == "before\n" + EXPECTED + "after <!-- end -->\n"
    assert tables.render(written, RESULTS) == written


def test_a_region_may_take_some_cases_and_two_machines(tables):
    region = "<!-- table: ops/q_sample N=8 -->\nold\n<!-- end -->"
    written = tables.render(region, RESULTS)
    assert "| drawn N=8 |" in written and "N=8192" not in written and "old" not in written
    slow = {"machine": {**MACHINE, "device": "CPU Y", "driver": "", "dirty": True}, "records": RECORDS[1:3]}
    both = tables.render(region, {"cpu-y/ops.json": slow, **RESULTS})
    assert "**CPU Y, 4 threads**, torch 2.14.1, Triton 3.8.0, commit 0123456 with changes, 2026-11-25" in both
    assert (
        both.index("CPU Y") < both.index("GPU X") and tables.render(both, {"cpu-y/ops.json": slow, **RESULTS}) == both
    )


def test_models_have_columns_of_their_own_numbers(tables):
    eager, ours = (record("model/X", "N=8", *names, 0.0) for names in (("eager", "", 2.0), ("erd-fast", "triton", 1.0)))
    for one, rate in ((eager, 1), (ours, 2)):
        del one["gb_per_s"]
        one |= {
            "images_per_sec": 8.0 * rate,
            "tflops": 100.0 * rate,
            "mfu": 0.1 * rate,
            "gradient_off": 2e-3,
            "peak_bytes": (3 << 30) // rate,
        }
    written = tables.render(
        "<!-- table: model/X -->\n<!-- end -->", {"x/ops.json": {"machine": MACHINE, "records": [eager, ours]}}
    )
    head, _, line = written.splitlines()[3:6]
    assert head.split(" | ")[-6:] == ["images/s", "TFLOP/s", "MFU", "gradient off", "GiB", "GiB eager |"]
    assert line.split(" | ")[-6:] == ["16", "200", "20.0%", "2.0e-03", "1.5", "3 |"]
    matmul = {**record("machine", "matmul", "eager", "", 1e-3, 0.0), "tflops": 700.0}
    del matmul["gb_per_s"]
    both = {"x/ops.json": {"machine": MACHINE, "records": [RECORDS[0], matmul]}}
    lines = tables.render("<!-- table: machine -->\n<!-- end -->", both).splitlines()
    assert lines[3] == "| case | eager | GB/s | of copy | TFLOP/s |"
    assert lines[5:7] == ["| copy | 1 ms (0.01) | 2000 | 100% |  |", "| matmul | 1 ms (0.01) |  |  | 700 |"]


def step_record(case: str, variant: str, rate: float, **more: float) -> dict[str, object]:
    made = record("step/DiT-X/2", case, variant, "triton" if variant == "erd-fast" else "", 8.0 / rate, 0.0)
    del made["gb_per_s"]
    return {**made, "images_per_sec": rate, "tflops": rate / 2, "loss_off": 1e-4, "gradient_off": 2e-3, **more}


STEPS = [
    {**record("machine", "matmul", "eager", "", 1e-3, 0.0), "tflops": 200.0},
    step_record("N=8", "erd-fast", 200.0, mfu=0.25, peak_bytes=3 << 30),
    step_record("N=8", "official", 50.0, mfu=0.0625, peak_bytes=6 << 30),
    step_record("N=8", "compile", 160.0),
    step_record("N=8", "no-kernels", 100.0),
    step_record("largest batch", "erd-fast", 400.0, batch=64),
    step_record("largest batch", "official", 100.0, batch=16),
]


def test_a_step_has_a_row_for_each_variant(tables):
    results = {"gpu-x/step.json": {"machine": MACHINE, "records": STEPS}}
    written = tables.render("<!-- table: step/DiT-X/2 -->\n<!-- end -->", results)
    assert written.count("**GPU X**") == 2 and written.count("`erd-fast` ran on `triton`.") == 2
    _, _, _, head, _, ours, official, compiled, *_ = written.splitlines()
    columns = "| variant | x erd-fast | images/s | time | TFLOP/s | MFU | of matmul | loss off | gradient off | GiB |"
    assert head == columns
    assert ours == "| erd-fast | 1.00 | 200 | 40 ms (0.4) | 100 | 25.0% | 50.0% | 1.0e-04 | 2.0e-03 | 3 |"
    assert official == "| official | 4.00 | 50 | 160 ms (1.6) | 25 | 6.2% | 12.5% | 1.0e-04 | 2.0e-03 | 6 |"
    assert compiled == "| compile | 1.25 | 160 | 50 ms (0.5) | 80 |  | 40.0% | 1.0e-04 | 2.0e-03 |  |"
    largest = written[written.index("largest batch") :].splitlines()
    assert largest[2].startswith("| variant | x erd-fast | images/s | time | N |")
    assert largest[4].startswith("| erd-fast | 1.00 | 400 | 20 ms (0.2) | 64 |")


def test_the_readme_compares_ours_with_the_baselines_alone(tables):
    results = {"gpu-x/ops.json": RESULTS["gpu-x/ops.json"], "gpu-x/step.json": {"machine": MACHINE, "records": STEPS}}
    written = tables.render("<!-- table: step -->\n<!-- end -->", results)
    assert written.splitlines()[3:7] == [
        "| model | batch | official | compile | erd-fast | x the fastest baseline |",
        "| --- | --- | --: | --: | --: | --: |",
        "| DiT-X/2 | N=8 | 50 | 160 | 200 | 1.25 |",
        "| DiT-X/2 | largest batch | 100 |  | 400 | 4.00 |",
    ]
    assert tables.render(written, results) == written
    assert tables.render("<!-- table: step -->\n<!-- end -->", RESULTS).splitlines()[1] == "Not measured."


def data_record(group: str, case: str, variant: str, **numbers: float) -> dict[str, object]:
    made = record(group, case, variant, "", 1e-3, 0.0)
    del made["gb_per_s"]
    return {**made, **numbers}


DATA = [
    data_record("data/read", "N=256", "mmap", latents_per_sec=128_000.0, cpu_ms_per_1k=4.0),
    data_record("data/read", "N=256", "hdf5", latents_per_sec=2000.0, cpu_ms_per_1k=812.3, processes=2),
    data_record("data/pace", "DiT-S/2", "mmap", wait_pct=0.25),
    data_record("data/pace", "DiT-S/2", "hdf5", wait_pct=76.5),
    data_record("data/pace", "DiT-XL/2", "mmap", wait_pct=0.0),
    data_record("data/memory", "3 epochs", "mmap", growth_bytes=3 << 20),
    data_record("data/step", "DiT-B/2 N=256", "mmap", wait_pct=0.5, images_per_sec=3000.0),
]


def test_reading_has_a_row_for_each_reader(tables):
    results = {"x/data.json": {"machine": MACHINE, "records": DATA}}
    head, _, mmap, hdf5 = tables.render("<!-- table: data -->\n<!-- end -->", results).splitlines()[3:7]
    assert head.split(" | ") == [
        *("| reader", "latents/s", "CPU ms per 1000", "MiB kept", "DiT-S/2 waits", "DiT-XL/2 waits"),
        *("DiT-B/2 N=256 trained waits", "DiT-B/2 N=256 images/s", "x hdf5 |"),
    ]
    assert mmap == "| mmap | 128,000 | 4 | 3.0 | 0.25% | 0.00% | 0.50% | 3000 | 64 |"
    assert hdf5 == "| hdf5 | 2,000 | 812 |  | 76.50% |  |  |  | 1 |"
    assert tables.render("<!-- table: data -->\n<!-- end -->", RESULTS).splitlines()[1] == "Not measured."


def test_what_nobody_measured_is_said(tables):
    region = "<!-- table: ops/draw -->\nsomething typed\n<!-- end -->\n"
    assert tables.render(region, RESULTS) == "<!-- table: ops/draw -->\nNot measured.\n<!-- end -->\n"


def test_the_documents_hold_what_the_results_say(tables):
    results = tables.read_results()
    stale = [file.name for file in tables.documents() if tables.render(text := file.read_text(), results) != text]
    assert not stale, f"run `python bench/tables.py`: {stale}"


def test_files_without_records_have_no_table(tables, tmp_path):
    (tmp_path / "gpu-x").mkdir()
    (tmp_path / "gpu-x" / "ops.json").write_text(json.dumps(RESULTS["gpu-x/ops.json"]))
    (tmp_path / "gpu-x" / "tests.json").write_text(json.dumps({"machine": MACHINE, "tests": []}))
    assert tables.read_results(tmp_path) == RESULTS


HALF_WAY = """
import run, sys; from pathlib import Path; from erd_fast.benchmark.records import Record
def measuring():
    yield Record("machine", "copy", "eager", "", 1.0, 0.1, 3, gb_per_s=5.0)
    sys.exit(7)
run._measured(Path("ops.json"), measuring())
"""


def test_results_are_written_as_they_come(tmp_path):
    """What is stopped half-way keeps what it has."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}){HALF_WAY}"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 7
    content = json.loads((tmp_path / "ops.json").read_text())
    assert [record["gb_per_s"] for record in content["records"]] == [5.0] and "torch" in content["machine"]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return bench_module("gpu")


def rows_of(folder: Path, *rows: dict[str, object]) -> Rows:
    written = Rows(folder / "rows.jsonl")
    for row in rows:
        written.write(**row)
    return written


def test_a_step_whose_check_failed_or_never_ran_is_no_record(gpu, tables, tmp_path):
    def step(variant: str, **more: object) -> dict[str, object]:
        measured = {name: value for name, value in step_record("N=8", variant, 100.0).items() if "off" not in name}
        return {"kind": "record", **measured, "checked": False, **more}

    def checked(variant: str, **found: object) -> dict[str, object]:
        return {"kind": "check", "group": "step/DiT-X/2", "case": "N=8", "variant": variant, **found}

    rows = rows_of(
        tmp_path,
        {"kind": "machine", **MACHINE},
        step("erd-fast"),
        checked("erd-fast", loss_off=1e-6, gradient_off=2e-3),
        step("compile"),
        checked("compile", error="RunError: loss is 0.5 off"),
        step("official"),
        {"kind": "record", **RECORDS[0]},
        {"kind": "variant", "group": "ops/draw", "case": "N=8", "variant": "triton", "error": "RuntimeError: bad"},
        {"kind": "test", "test": "tests/a.py::b", "outcome": "failed", "why": "assert False"},
        {"kind": "test", "test": "tests/a.py::c", "outcome": "passed"},
        {"kind": "stage", "stage": "ops", "outcome": "killed at its limit of 2 s", "seconds": 2.0},
    )
    found = gpu.results(rows, "")
    assert [(row["variant"], row.get("gradient_off")) for row in found["records"]] == [
        ("erd-fast", 2e-3),
        ("eager", None),
    ]
    assert {row["variant"]: row["error"] for row in found["unchecked"]} == {
        "compile": "RunError: loss is 0.5 off",
        "official": "was not checked",
    }
    assert found["machine"] == MACHINE and found["tests"] == {
        "failed": 1,
        "passed": 1,
        "failed_tests": ["tests/a.py::b"],
    }
    text = gpu.summary({"rehearsal": False, **found})
    assert "REHEARSAL" in gpu.summary({"rehearsal": True, **found}) and "REHEARSAL" not in text
    for line in (
        "UNCHECKED step/DiT-X/2 N=8 compile: RunError: loss is 0.5 off",
        "FAILED variant ops/draw N=8 triton: RuntimeError: bad",
        "tests: 1 failed, 1 passed",
        "FAILED tests/a.py::b",
    ):
        assert line in text.splitlines()
    assert re.search(r"^ops +2.0 s  killed at its limit of 2 s$", text, re.MULTILINE) and gpu.has_failed(found)
    written = tables.render("<!-- table: step/DiT-X/2 -->\n<!-- end -->", {"x/gpu.json": found})
    assert "| erd-fast |" in written and "compile" not in written
    assert gpu.results(rows, "abc")["machine"] == {**MACHINE, "commit": "abc", "dirty": None}


def test_a_run_without_failures_has_not_failed(gpu, tmp_path):
    rows = rows_of(
        tmp_path,
        {"kind": "test", "test": "a", "outcome": "skipped"},
        {"kind": "stage", "stage": "a", "outcome": "ok", "seconds": 1.0},
        {"kind": "stage", "stage": "b", "outcome": "no time left", "seconds": 0.0},
    )
    assert not gpu.has_failed(gpu.results(rows, ""))


def test_every_file_with_tests_for_a_gpu_is_among_those_that_run(gpu):
    marked = {
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()
    }
    # The first one needs the GPU to itself, the second one is this file.
    exempt = {"tests/benchmark/test_timing.py", "tests/benchmark/test_results.py"}
    assert marked - exempt <= set(gpu.TESTS) and all((ROOT / name).is_file() for name in gpu.TESTS)


def test_a_case_that_was_measured_or_failed_is_not_measured_again(gpu, tmp_path, monkeypatch):
    rows = rows_of(
        tmp_path,
        {"kind": "record", **record("ops/draw", "N=8", "eager", "", 1e-3, 1.0)},
        {"kind": "case", "group": "ops/draw", "case": "N=64", "error": "RuntimeError: CUDA error"},
    )
    gpu.measure_ops(("ops/draw N=8", "ops/draw N=64", "ops/diffusion_loss N=8"), rows, seconds=0.001)
    assert {f"{row['group']} {row['case']}" for row in rows.read("record")} == {
        "ops/draw N=8",
        "ops/diffusion_loss N=8",
    }


def test_a_gpu_that_is_lost_costs_only_the_variant_that_lost_it(gpu, tmp_path, monkeypatch):
    """The stage ends with that variant noted, and the next process measures the rest of the case."""
    rows, body, lost = Rows(tmp_path / "rows.jsonl"), OPS["diffusion_loss"].forward.body, []

    def illegal(**args: Any) -> Any:
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "usable", lambda: not lost)
    monkeypatch.setattr(OPS["diffusion_loss"].forward, "body", illegal)
    cases = ("ops/diffusion_loss N=8", "ops/draw N=8")
    with pytest.raises(SystemExit) as ended:
        gpu.measure_ops(cases, rows, seconds=0.001)
    rows.write("stage", stage="ops", outcome=f"failed with exit status {ended.value.code}")
    assert gpu.lost_the_gpu(rows) and not rows.read("record")
    assert [row["variant"] for row in rows.read("variant")] == ["reference"]
    monkeypatch.setattr(OPS["diffusion_loss"].forward, "body", body)
    lost.clear()
    gpu.measure_ops(cases, rows, seconds=0.001)
    rows.write("stage", stage="ops", outcome="ok")
    measured = {(f"{row['group']} {row['case']}", row["backend"]) for row in rows.read("record")}
    assert {name for name, _ in measured} == set(cases) and ("ops/diffusion_loss N=8", "reference") not in measured
    assert not gpu.lost_the_gpu(rows)


def test_a_variant_that_is_wrong_is_noted_and_the_others_are_timed(gpu, tmp_path, monkeypatch):
    body = OPS["diffusion_loss"].forward.body

    def wrong_body(**args: Any) -> DiffusionLoss:
        return DiffusionLoss(*[1.001 * value for value in body(**args)])

    monkeypatch.setattr(OPS["diffusion_loss"].forward, "body", wrong_body)
    rows = Rows(tmp_path / "rows.jsonl")
    gpu.measure_ops(("ops/diffusion_loss N=8",), rows, seconds=0.001)
    (wrong,) = rows.read("variant")
    assert wrong["variant"] == "reference" and re.match(r"RunError: bench: .* is .* off, allowed", wrong["error"])
    assert {"eager", "erd-fast"} <= {row["variant"] for row in rows.read("record")}
