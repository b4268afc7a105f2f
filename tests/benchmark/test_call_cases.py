"""call_cases: the overhead of single calls on a CPU, with ratios and their limits."""

import dataclasses
import json

import pytest
import torch

from erd_fast import cli
from erd_fast.benchmark import ops as bench
from erd_fast.benchmark.call_cases import LIMITS, CallCase, call_cases
from erd_fast.benchmark.ops import bench_case
from erd_fast.benchmark.records import Record, limits
from erd_fast.benchmark.workload import Variant, call_of, running
from erd_fast.errors import RunError
from erd_fast.ops import OPS

CPU = torch.device("cpu")
OURS = Variant("erd-fast")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(bench, "_CALLS_SECONDS", 1e-3)
    monkeypatch.setattr(bench, "_COPY_BYTES", 1 << 20)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured on a CPU only")
def test_the_command_records_ratios_with_their_limits(tmp_path, capsys, two_threads):
    file = tmp_path / "calls.json"
    cli.main(["bench", "ops", "--filter", "calls", "--seconds", "0.01", "--json", str(file)])
    records = [record for record in json.loads(file.read_text())["records"] if record["group"] != "machine"]
    has_kernel = OPS["q_sample"].why_not("cpu") is None
    assert [(r["group"], r["variant"]) for r in records if r["group"] != "calls/q_sample" or has_kernel] == [
        (case.group, variant)
        for case in call_cases(CPU)
        for variant in (*case.baselines(CPU), "erd-fast")
        if case.op != "q_sample" or has_kernel
    ]
    printed = capsys.readouterr().out
    for base, ours in zip(records[::2], records[1::2], strict=False):
        assert (base["group"], base["case"]) == (ours["group"], ours["case"])
        assert "ratio" not in base and ours["backend"]
        assert ours["ratio"] == pytest.approx(ours["median_s"] / base["median_s"])
        assert ours["limit"] == LIMITS[ours["group"].removeprefix("calls/")]
        line = f"above its limit: {ours['group']} {ours['case']}: ratio {ours['ratio']:.2f}, limit {ours['limit']:.2f}"
        assert (line in printed) == (ours["ratio"] > ours["limit"])
    assert "ratio" in printed and "limit" in printed
    assert torch.get_num_threads() == 2


def test_calls_run_on_one_thread_which_is_restored(two_threads):
    workload = CallCase("ada_layer_norm", "grad").build(CPU)
    with running(workload, OURS):
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), running(workload, OURS):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("case", call_cases(CPU), ids=lambda case: f"{case.group} {case.mode}")
def test_only_calls_with_gradient_make_a_graph(case):
    workload = case.build(CPU)
    for variant in (*map(Variant, case.baselines(CPU)), OURS):
        if variant.name == "kernel" and OPS["q_sample"].why_not("cpu") is not None:
            continue
        with running(workload, variant):
            results = call_of(workload, variant)(0)
        assert all(value.requires_grad == (case.mode == "grad") and value.std() > 0 for value in results)


@pytest.mark.parametrize("op", LIMITS)
def test_a_wrong_result_is_not_timed(op, monkeypatch):
    case = CallCase(op, "no-grad")
    workload = case.build(CPU)
    wrong = [1.01 * value for value in workload.ours(0)]
    monkeypatch.setattr(CallCase, "build", lambda *_: dataclasses.replace(workload, ours=lambda copy: tuple(wrong)))
    with pytest.raises(RunError, match=rf"calls/{op} .*: result 0 is .* off"):
        list(bench_case(case, CPU, 0.001))


def test_a_gpu_has_none():
    assert call_cases(torch.device("cuda")) == []


def test_ratios_above_their_limits_are_named():
    def record(group: str, ratio: float | None = None, limit: float | None = None) -> Record:
        return Record(group, "N=1", "erd-fast", "cpu", 1.0, 0.0, 3, ratio=ratio, limit=limit)

    assert limits([record("ops/x")]) == []
    assert limits([record("ops/x"), record("calls/x", 1.5, 1.5)]) == ["all ratios are within their limits"]
    assert limits([record("calls/x", 1.5, 1.5), record("calls/y", 2.0, 1.25)]) == [
        "above its limit: calls/y N=1: ratio 2.00, limit 1.25"
    ]
