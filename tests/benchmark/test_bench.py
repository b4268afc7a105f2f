"""bench: what is measured, checked and written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erd_fast import cli
from erd_fast.benchmark import block_cases
from erd_fast.benchmark import op_cases as cases
from erd_fast.benchmark import ops as bench
from erd_fast.benchmark.op_cases import MODES, SIZES, OpCase
from erd_fast.benchmark.ops import bench_case, check, truth, variants_of
from erd_fast.benchmark.records import Record, machine_name, table, write_records
from erd_fast.benchmark.workload import Variant, call_of, running
from erd_fast.errors import ConfigError, RunError
from erd_fast.ops import OPS, use_backend

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KINDS = [(op, mode) for op, modes in MODES.items() for mode in modes]
EAGER, REFERENCE = Variant("eager"), Variant("erd-fast", "reference")


@pytest.fixture
def eager_in_place_of_compile(monkeypatch):
    """Compiling takes ten seconds; what is compiled is the same function."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    """128 MiB of inputs take a while to make."""
    for module in (cases, block_cases):
        monkeypatch.setattr(module, "copies_past_cache", lambda _: 2)
    monkeypatch.setattr(cases, "_STORED", 64)
    monkeypatch.setattr(bench, "_COPY_BYTES", 1 << 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="backends of the CPU")
def test_the_command_prints_and_writes_every_variant(tmp_path, capsys, eager_in_place_of_compile):
    file = tmp_path / "out" / "ops.json"
    cli.main(["bench", "ops", "--filter", "q_sample given N=8", "--seconds", "0.01", "--json", str(file)])
    content = json.loads(file.read_text())
    wanted = {"device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "date", "threads"}
    assert wanted <= content["machine"].keys()
    copy, *records = content["records"]
    assert (copy["group"], copy["case"], copy["variant"]) == ("machine", "copy", "eager")
    assert copy["gb_per_s"] == pytest.approx((2 << 20) / copy["median_s"] / 1e9)
    here = [("erd-fast", name) for name in ("cpu", "reference") if OPS["q_sample"].why_not(name) is None]
    assert [(record["variant"], record["backend"]) for record in records] == [("eager", ""), ("compile", ""), *here]
    for record in records:
        assert (record["group"], record["case"]) == ("ops/q_sample", "given N=8")
        assert record["median_s"] > 0 and record["iqr_s"] >= 0 and record["runs"] >= 3
        # fp16 moments, two given normals, x_t and target in fp32.
        assert record["gb_per_s"] == pytest.approx(8 * 4096 * (4 + 8 + 4 + 4) / record["median_s"] / 1e9)
    printed = capsys.readouterr()
    assert "x eager" in printed.out and "of copy" in printed.out and f"wrote {file}" in printed.out
    assert printed.err.splitlines() == ["machine copy", "[1/1] ops/q_sample given N=8"]


def test_every_op_is_measured():
    """attention has a command of its own."""
    for device in (CPU, torch.device("cuda")):
        assert {case.group for case in bench.cases("ops", device)} >= {f"ops/{op}" for op in OPS if op != "attention"}


def test_the_ops_on_latents_are_measured_at_every_size_and_a_gpu_has_the_calls_of_a_step_too():
    on_cpu, on_gpu = (cases.op_cases(torch.device(name)) for name in ("cpu", "cuda"))
    assert [(case.op, case.mode, case.size) for case in on_cpu] == [(*kind, size) for kind in KINDS for size in SIZES]
    assert {case.group for case in on_cpu} == {f"ops/{op}" for op in MODES}
    assert {case.group for case in on_gpu} == {f"ops/{op}" for op in MODES} | {"calls/step"}
    assert [v.name for v in variants_of(on_gpu[-1], torch.device("cuda"))[:3]] == ["eager", "compile", "compile-graphs"]


@pytest.mark.parametrize("layout", [(torch.float32, 0), (torch.bfloat16, 2)], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("op", "mode"), KINDS)
def test_variants_agree_on_every_case(op, mode, layout, monkeypatch, eager_in_place_of_compile):
    """Also in the layout of a GPU, where ours are patch tokens and the baseline's images."""
    monkeypatch.setattr(cases, "_layout", lambda device: layout)
    case = OpCase(op, mode, 4)
    workload = case.build(CPU)
    expected = truth(workload)
    assert (workload.as_ours is not None) == (op == "diffusion_loss" or mode == "given")
    for variant in variants_of(case, CPU):
        with running(workload, variant):
            check(case, workload, variant, call_of(workload, variant)(0), expected)
    floats = [value for value in expected if value.is_floating_point()]
    assert (op == "draw") or {value.dtype for value in floats} == {torch.float32, layout[0]}
    assert all(value.std() > 0 for value in floats if value.dim())


def test_copies_of_the_inputs_differ():
    for op, mode in KINDS:
        workload = OpCase(op, mode, 4).build(CPU)
        with use_backend("reference"):
            first, second = workload.ours(0), workload.ours(1)
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), op


@pytest.mark.parametrize(("op", "mode"), KINDS)
def test_a_result_that_is_off_is_refused(op, mode):
    case = OpCase(op, mode, 2)
    workload = case.build(CPU)
    expected = truth(workload)
    for number, value in enumerate(expected):
        off = ~value if value.dtype == torch.bool else value + 1 if not value.is_floating_point() else 1.001 * value
        for wrong in (off, value.double() if value.is_floating_point() else value.float(), value[None]):
            found = (*expected[:number], wrong, *expected[number + 1 :])
            with pytest.raises(
                RunError, match=rf"bench: {case.group} {case.name}, reference: result {number} is .* off"
            ):
                check(case, workload, REFERENCE, found, expected)
    broken = (*expected[:-1], torch.full_like(expected[-1], float("nan"))) if expected[-1].is_floating_point() else None
    if broken:
        with pytest.raises(RunError, match="is nan off"):
            check(case, workload, REFERENCE, broken, expected)


def test_a_backend_that_is_wrong_is_not_timed(make_wrong, eager_in_place_of_compile):
    make_wrong(OPS["q_sample"].forward, 1.001)
    with pytest.raises(RunError, match="q_sample given N=2, reference: result 0"):
        list(bench_case(OpCase("q_sample", "given", 2), CPU, 0.01))


def test_a_compiler_that_does_not_work_here_is_said_and_left_out(monkeypatch, capsys):
    def broken(function, **_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    records = list(bench_case(OpCase("draw", "", 2), CPU, 0.01))
    assert [record.variant for record in records if not record.backend] == ["eager"] and len(records) > 1
    assert "compile does not run here and is left out: no C++ compiler" in capsys.readouterr().err


def test_a_baseline_that_is_wrong_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: [0.5 * out for out in function(*args)])
    records = list(bench_case(OpCase("q_sample", "given", 2), CPU, 0.01))
    assert "compile" not in [record.variant for record in records] and len(records) > 1
    assert "compile does not run here and is left out: bench: ops/q_sample given N=2, compile: result 0 is" in (
        capsys.readouterr().err
    )


def test_what_does_not_fit_is_said_and_left_out(monkeypatch, capsys, eager_in_place_of_compile):
    case = OpCase("q_sample", "given", 2)

    def refused(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(OPS["q_sample"].forward, "body", refused)
        records = list(bench_case(case, CPU, 0.01))
    assert "reference" not in [record.backend for record in records] and records
    assert "reference does not run here and is left out: no memory" in capsys.readouterr().err
    monkeypatch.setattr(OpCase, "build", refused)
    assert list(bench_case(case, CPU, 0.01)) == []
    assert "ops/q_sample given N=2 does not run here and is left out: no memory" in capsys.readouterr().err


def test_no_case_is_begun_after_the_limit(monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench_case", lambda case, *_: [case])
    assert len(list(bench.bench("ops", "ops/draw", 0.001, limit=0.0))) == 1
    assert "[2/5] ops/draw N=64: left out, 0 seconds have passed" in capsys.readouterr().err


def test_a_filter_without_a_case_is_refused():
    with pytest.raises(
        ConfigError, match="filter: given 'lamb', allowed part of a case's name: ops/draw, ops/q_sample"
    ):
        list(bench.bench("ops", "lamb"))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("", 54),
        ("N=8", 25),
        ("q_sample", 11),
        ("calls", 7),
        ("q_sample drawn", 5),
        ("ops/step N=1024", 1),
        ("model/DiT-S/2", 1),
    ],
)
def test_a_filter_takes_the_cases_that_contain_it(pattern, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "bench_case", lambda case, *_: [case])
    monkeypatch.setattr(bench, "_MATRIX", 8)
    found = [case for case in bench.bench("ops", pattern, 0.001) if not isinstance(case, Record)]
    assert len(found) == count and all(pattern in f"{case.group} {case.name}" for case in found)
    assert pattern != "N=8" or {case.size for case in found} == {8}


def test_a_large_product_is_measured_where_a_case_has_products(monkeypatch):
    monkeypatch.setattr(bench, "bench_case", lambda case, *_: [])
    monkeypatch.setattr(bench, "_MATRIX", 64)
    assert [record.case for record in bench.bench("ops", "q_sample", 0.001)] == ["copy"]
    matmul = list(bench.bench("ops", "linear_gelu", 0.001))[1]
    assert (matmul.group, matmul.case, matmul.gb_per_s) == ("machine", "matmul", None)
    side = 64 * (8 if torch.cuda.is_available() else 1)
    assert matmul.tflops == pytest.approx(2 * side**3 / matmul.median_s / 1e12)


def test_numbers_that_do_not_apply_are_not_written(tmp_path):
    record = Record("model/x", "N=8", "eager", "", 2.0, 0.1, 3, tflops=4.0, images_per_sec=4.0)
    write_records(tmp_path / "x.json", [record], {"device": "X"})
    content = json.loads((tmp_path / "x.json").read_text())
    names = ["group", "case", "variant", "backend", "median_s", "iqr_s", "runs", "tflops", "images_per_sec"]
    assert list(content["records"][0]) == names and content["machine"] == {"device": "X"}
    head, line = table([record]).splitlines()
    assert head.split()[-4:] == ["TFLOP/s", "images/s", "x", "eager"] and line.split()[-3:] == ["4", "4.0", "1.00"]


def test_the_table_compares_with_eager_of_the_same_case_and_with_a_copy():
    records = [
        Record(group, "N=8", variant, "", seconds, 0.0, 9, rate)
        for group, variant, seconds, rate in [
            ("machine", "eager", 1.0, 8.0),
            ("ops/x", "eager", 4e-6, 1.0),
            ("ops/y", "eager", 9e-6, 1.0),
            ("ops/x", "erd-fast", 1e-6, 4.0),
        ]
    ]
    last = table(records).splitlines()[-1].split()
    assert last[-3:] == ["4.00", "50.0%", "4.00"]


def test_a_machine_has_a_name_for_a_folder():
    assert set(machine_name()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert torch.cuda.is_available() or machine_name().endswith(f"{torch.get_num_threads()}-threads")


@pytest.mark.build
def test_the_files_of_bench_run_on_the_same_cases():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    names = {f"bench_{op}.py" for op in OPS if op != "attention"}  # which has a command of its own
    assert {file.name for file in (ROOT / "bench").glob("bench_*.py")} >= names


# Whatever else the package depends on is not there where `make gpu` must run.
REFUSED = ("tyro", "tqdm", "matplotlib", "sklearn", "scipy", "joblib", "PIL", "torchvision", "diffusers")
WITHOUT = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REFUSED}:
            raise ModuleNotFoundError("refused " + name, name=name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, "bench")
import gpu, pytest, run
from erd_fast.benchmark import ops, records
how = ["--collect-only", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
sys.exit(pytest.main([*how, *gpu.TESTS, "bench"]))
"""


def test_what_make_gpu_runs_needs_few_packages():
    pytest.importorskip("pytest_benchmark")
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert "test_gpu.py" in run.stdout and "bench_draw.py" in run.stdout
