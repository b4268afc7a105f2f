"""attention: what is measured of it, and that all variants of a case compute the same."""

import json

import pytest
import torch

from erd_fast import cli
from erd_fast.benchmark import attention
from erd_fast.benchmark import ops as bench
from erd_fast.benchmark.attention import SEQUENCES, AttentionCase
from erd_fast.benchmark.ops import bench_case, check, truth, variants_of
from erd_fast.benchmark.workload import call_of, running
from erd_fast.errors import RunError
from erd_fast.ops import OPS
from erd_fast.ops.core.backend import External

CPU = torch.device("cpu")
MODES = ("forward", "backward")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(attention, "copies_past_cache", lambda _: 2)
    monkeypatch.setitem(SEQUENCES, "tiny", (17, 2, 16))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("mode", MODES)
def test_variants_agree(mode):
    case = AttentionCase("tiny", 3, mode)
    workload = case.build(CPU)
    expected = truth(workload)
    assert [value.shape for value in expected] == [(3, 17, 32 if mode == "forward" else 96)]
    variants = variants_of(case, CPU)
    assert {variant.name for variant in variants} == {"eager", "compile", "erd-fast"}
    assert {"flash", "reference"} <= {variant.backend for variant in variants}
    for variant in variants:
        with running(workload, variant):
            check(case, workload, variant, call_of(workload, variant)(0), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_backend_that_is_wrong_is_not_timed(mode, make_wrong):
    direction = getattr(OPS["attention"], mode)
    make_wrong(direction, 1.001, direction.fields[0])
    with pytest.raises(RunError, match=f"attention tiny T=17 H=2 K=16 N=3 {mode}, reference: result 0 is"):
        list(bench_case(AttentionCase("tiny", 3, mode), CPU, 0.01))


@pytest.mark.skipif(torch.cuda.is_available(), reason="backends of the CPU")
@pytest.mark.parametrize("mode", MODES)
def test_what_another_project_cannot_do_is_left_out(mode, monkeypatch, capsys):
    flash = OPS["attention"].backends["flash"]

    def call(qkv, num_heads):
        if mode == "forward":
            raise AssertionError("head dimension 16 is not for this GPU")
        return 1.01 * flash.call(qkv, num_heads)

    monkeypatch.setitem(OPS["attention"].backends, "flash", External("flash", call, flash.rule, device=""))
    records = list(bench_case(AttentionCase("tiny", 3, mode), CPU, 0.01))
    assert [record.backend for record in records if record.variant == "erd-fast"] == ["reference"]
    assert "  flash does not run here and is left out: " in capsys.readouterr().err


def test_work_is_counted():
    """Two products of T x T x K a head forward, five backward; qkv and the output are 4 parts, with gradients 8."""
    forward, backward = (AttentionCase("tiny", 3, mode).build(CPU) for mode in MODES)
    product = 2 * 3 * 2 * 17 * 17 * 16
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)
    part = 3 * 17 * 32 * 4
    assert (forward.bytes_moved, backward.bytes_moved) == (4 * part, 8 * part)


def test_a_gpu_has_all_batches_and_a_cpu_the_smallest():
    counts = [len(attention.attention_cases(torch.device(name))) for name in ("cpu", "cuda")]
    assert counts == [2 * len(SEQUENCES), 6 * len(SEQUENCES)]


def test_the_command_writes_its_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_MATRIX", 64)
    file = tmp_path / "attn.json"
    cli.main(["bench", "attention", "--filter", "tiny", "--seconds", "0.01", "--json", str(file)])
    records = json.loads(file.read_text())["records"]
    assert {record["case"] for record in records[2:]} == {f"tiny T=17 H=2 K=16 N=8 {mode}" for mode in MODES}
    assert all(record["tflops"] > 0 for record in records if record["group"] == "attention")
    assert "wrote" in capsys.readouterr().out
