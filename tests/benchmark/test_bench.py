"""bench: what is measured, checked and written."""

import json

import pytest
import torch

from erd_fast import cli
from erd_fast.benchmark import ops as bench
from erd_fast.benchmark.op_cases import op_cases
from erd_fast.benchmark.records import Record, table
from erd_fast.benchmark.timing import measure
from erd_fast.errors import ConfigError, RunError
from erd_fast.ops import OPS, use_backend

CPU = torch.device("cpu")


@pytest.fixture
def eager_in_place_of_compile(monkeypatch):
    """Compiling takes ten seconds; what is compiled is the same function."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of the CPU")
def test_the_command_prints_and_writes_every_backend(tmp_path, capsys, eager_in_place_of_compile):
    file = tmp_path / "out" / "ops.json"
    cli.main(["bench", "ops", "--filter", "q_sample given N=8", "--seconds", "0.01", "--json", str(file)])
    content = json.loads(file.read_text())
    assert {"device", "torch", "python", "commit", "dirty", "date", "threads"} <= content["machine"].keys()
    found = [(record["variant"], record["backend"]) for record in content["records"]]
    here = [("erd-fast", name) for name in ("cpu", "reference") if OPS["q_sample"].refusal(name) is None]
    assert found == [("eager", ""), ("compile", ""), *here]
    for record in content["records"]:
        assert (record["group"], record["case"]) == ("ops/q_sample", "given N=8")
        assert record["median_s"] > 0 and record["runs"] >= 10
        # fp16 moments, two given normals, x_t and target in fp32.
        assert record["gb_per_s"] == pytest.approx(8 * 4096 * (4 + 8 + 4 + 4) / record["median_s"] / 1e9)
    printed = capsys.readouterr().out
    assert "x eager" in printed and f"wrote {file}" in printed


@pytest.mark.parametrize("op", bench.BENCHED)
def test_ours_and_eager_are_one_computation(op):
    for case in op_cases(op, 4, CPU, 2):
        with use_backend("reference"):
            ours, eager = case.ours(1), case.eager(1)
        assert [value.shape for value in ours][: len(eager)] == [value.shape for value in eager] or op == "draw"
        if case.comparable:
            bench._check(case, "reference")


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch, eager_in_place_of_compile):
    body = OPS["q_sample"].body
    monkeypatch.setattr(OPS["q_sample"], "body", lambda *args: tuple(1.001 * value for value in body(*args)))
    case = next(case for case in op_cases("q_sample", 2, CPU, 1) if case.comparable)
    with use_backend("reference"), pytest.raises(RunError, match=r"q_sample given N=2 on reference is .* away"):
        bench._check(case, "reference")


def test_a_filter_without_a_case_is_refused():
    with pytest.raises(ConfigError, match="filter: given 'adam', allowed part of a case's name: draw, q_sample"):
        list(bench.bench_ops("adam"))


def test_timing_takes_every_copy_in_turn():
    seen = []
    timing = measure([lambda: seen.append(0), lambda: seen.append(1)], CPU, seconds=0.01)
    assert timing.runs >= 10 and seen[:4] == [0, 1, 0, 1] and timing.median_s > 0


def test_the_table_compares_with_eager_of_the_same_case():
    records = [
        Record("ops/x", "N=8", variant, "", seconds, 0.0, 9, 1.0)
        for variant, seconds in (("eager", 4e-6), ("erd-fast", 1e-6))
    ]
    lines = table(records).splitlines()
    assert lines[2].split()[-1] == "4.00" and lines[1].split()[-1] == "1.00"
