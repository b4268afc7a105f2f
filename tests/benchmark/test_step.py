"""bench step: all variants compute one step, what does not is refused, and what is written."""

import dataclasses
import gc
import json
import sys
import types
import weakref
from typing import Any

import pytest
import torch

from erd_fast import cli
from erd_fast.benchmark import ops, step, step_cases, step_ours, step_report
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.step import bench_case, bench_step, largest_batch, make_trainer, variants_of
from erd_fast.benchmark.step_baselines import RECIPES, Baseline, baselines
from erd_fast.benchmark.step_cases import BATCHES, Problem, StepCase, make_problem
from erd_fast.benchmark.step_check import Evidence, check, witness
from erd_fast.benchmark.step_ours import IN_BFLOAT16, IN_FLOAT16, OURS
from erd_fast.errors import ConfigError, RunError
from erd_fast.models import create_model, model_flops
from erd_fast.ops import OPS
from erd_fast.training.config import ModelConfig

pytestmark = pytest.mark.slow

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DIT = ModelConfig("DiT-tiny/8", hidden_size=32, depth=2, num_heads=2)
UVIT = ModelConfig("U-ViT-tiny", patch_size=4, hidden_size=32, depth=2, num_heads=2)
CASE = StepCase(DIT, 4)
ON_CPU = [
    OURS,
    *("official", "sdpa-fused", "compile"),
    *(IN_BFLOAT16, "no-fused-optimizer", "no-fused-noise-loss", "no-kernels", "recompute-on"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch, eager_in_place_of_compile):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step_cases, "_STORED", 64)
    monkeypatch.setattr(step_ours, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(step, "_SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(ops, "_MATRIX", 32)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Room is made by collecting garbage, which looks at every object there is."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def problem() -> Problem:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_cases, "_STORED", 64)
        return make_problem(CASE, CPU)


def evidence_of(problem: Problem, name: str) -> Evidence:
    trainer = make_trainer(problem, name)
    trainer.step()
    return witness(trainer)


@pytest.mark.parametrize("model", [DIT, UVIT], ids=lambda model: model.name)
def test_every_variant_agrees_with_plain_pytorch(model):
    records = {record.variant: record for record in bench_case(StepCase(model, 4), CPU, 0.01)}
    assert list(records) == ON_CPU
    sizes = {**model.overrides(), "input_size": 32}
    flops = 3 * 4 * model_flops(create_model(model.name, device="meta", **sizes))
    for name, record in records.items():
        assert (record.group, record.case, record.batch) == (f"step/{model.name}", "N=4", None)
        assert bool(record.backend) == (name not in RECIPES) and record.runs >= 5
        assert record.images_per_sec == pytest.approx(4 / record.median_s)
        assert record.tflops == pytest.approx(flops / record.median_s / 1e12)
        off = 0.1 if name == IN_BFLOAT16 else 1e-5
        assert 0 <= record.loss_off < off and 0 <= record.gradient_off < off
    assert records["recompute-on"].gradient_off > 0  # a fused model rounds elsewhere
    assert "draw=cpu" not in records["no-fused-noise-loss"].backend


@pytest.fixture
def lowered(problem) -> Problem:
    """As on a GPU."""
    train = dataclasses.replace(problem.config.train, precision="bf16")
    return dataclasses.replace(problem, config=dataclasses.replace(problem.config, train=train))


@pytest.mark.parametrize("name", ["no-fused-optimizer", "no-fused-noise-loss", "no-kernels"])
def test_low_precision_trains_on_masters_without_a_piece_of_ours_too(lowered, name):
    evidence = evidence_of(lowered, name)
    assert bool(evidence.copies) == (name != "no-kernels")
    check(lowered, evidence, name)


@pytest.mark.parametrize("scale", [2.0**30, 2.0**12])
def test_float16_is_checked_on_a_step_that_is_taken_and_without_its_loss_scale(problem, scale, monkeypatch):
    """The scale is halved until a step is finite, and may double right after the step that is checked."""
    trainer = make_trainer(problem, IN_FLOAT16)
    trainer.step()
    trainer.optimizer.loss_scale.fill_(scale)
    monkeypatch.setattr(trainer.optimizer, "_growth_interval", 1)
    off = check(problem, witness(trainer), IN_FLOAT16)
    assert 0 < off.gradient < 0.1


@pytest.mark.parametrize(("name", "half"), [("official", torch.float16), ("sdpa-fused", torch.bfloat16)])
def test_baselines_of_low_precision_run_in_autocast(lowered, name, half):
    trainer = make_trainer(lowered, name)
    seen = []
    trainer.model.final_layer.linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.step()
    check(lowered, witness(trainer), name)
    assert set(seen) == {half}
    assert trainer.optimizer.scaler.is_enabled() == (half == torch.float16)


def changed(named: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    first = next(iter(named))
    return {**named, first: named[first] * factor}


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda found: found._replace(loss=found.loss * 1.001), "loss is"),
        (lambda found: found._replace(gradients=changed(found.gradients, 1.001)), "x_embedder.proj.weight is"),
        (lambda found: found._replace(clipped=True), "x_embedder.proj.weight is"),
        (
            lambda found: found._replace(values=found.before.values),
            "x_embedder.proj.weight after the step is",
        ),
        (lambda found: found._replace(before=found.before._replace(taken=0)), "x_embedder.proj.weight after the step"),
        (
            lambda found: found._replace(averages=found.before.averages),
            "average of x_embedder.proj.weight is",
        ),
        (lambda found: found._replace(drawn=found.drawn._replace(noise=-found.drawn.noise)), "loss is"),
    ],
)
def test_every_part_of_a_step_is_checked(problem, spoil, what):
    evidence = evidence_of(problem, OURS)
    check(problem, evidence, "here")
    with pytest.raises(RunError, match=f"bench: here: {what}.* off, allowed"):
        check(problem, spoil(evidence), "here")


def test_a_copy_that_was_not_made_is_seen(problem):
    evidence = evidence_of(problem, IN_BFLOAT16)
    with pytest.raises(RunError, match=r"here: copy of x_embedder.proj.weight is 8.19e\+03 off, allowed 0"):
        check(problem, evidence._replace(copies=changed(evidence.copies, 1.01)), "here")


def test_a_kernel_of_ours_that_is_wrong_ends_the_run(monkeypatch):
    body = OPS["linear_gelu"].backward.body
    monkeypatch.setattr(OPS["linear_gelu"].backward, "body", lambda **how: tuple(1.01 * out for out in body(**how)))
    with pytest.raises(RunError, match=r"bench: step/DiT-tiny/8 N=4, erd-fast: \S+ is .* off, allowed"):
        list(bench_case(CASE, CPU, 0.01))


def test_a_baseline_that_is_wrong_is_said_and_left_out(monkeypatch, capsys):
    recipe = RECIPES["official"]._replace(average=lambda averages, values, decay: None)
    monkeypatch.setitem(RECIPES, "official", recipe)
    records = list(bench_case(CASE, CPU, 0.01))
    assert [record.variant for record in records] == [name for name in ON_CPU if name != "official"]
    assert "official does not run here and is left out: bench: step/DiT-tiny/8 N=4, official: average of" in (
        capsys.readouterr().err
    )


def test_a_compiler_that_does_not_work_here_is_said_and_left_out(monkeypatch, capsys):
    def broken(model, **_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert "compile" not in [record.variant for record in bench_case(CASE, CPU, 0.01)]
    assert "compile does not run here and is left out: no C++ compiler" in capsys.readouterr().err


@pytest.fixture(params=[torch.OutOfMemoryError("no memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED, no memory")])
def memory(request, monkeypatch):
    """``memory(images)``: room for models in training that take steps of so many images altogether."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def limit(images: int) -> "weakref.WeakSet[Any]":
        def make(problem: Problem, name: str) -> step.Trainer:
            size = problem.config.train.batch_size
            if size * (1 + len(alive)) > images:
                raise type(request.param)(*request.param.args)
            trainer = make_trainer(problem, name)
            alive.add(trainer)
            return trainer

        monkeypatch.setattr(step, "make_trainer", make)
        return alive

    return limit


def test_variants_make_room_where_they_do_not_fit_together(memory, monkeypatch):
    alive, together, timed = memory(12), [], step.interleaved

    def interleaved(samplers, *how):
        together.append((len(samplers), len(alive)))
        return timed(samplers, *how)

    monkeypatch.setattr(step, "interleaved", interleaved)
    assert [record.variant for record in bench_case(CASE, CPU, 0.01)] == ON_CPU
    assert together == [(3, 3)] * 3


def test_variants_that_disturb_each_other_make_room_too(monkeypatch):
    monkeypatch.setattr(step, "_undisturbed", lambda ready: len(ready) <= 4)
    assert [record.variant for record in bench_case(CASE, CPU, 0.01)] == ON_CPU


def test_what_does_not_fit_alone_is_said_and_left_out(memory, capsys):
    memory(3)
    assert list(bench_case(CASE, CPU, 0.01)) == []
    assert f"{OURS} does not run here and is left out: " in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "largest"), [(0, 0), (1, 1), (3, 2), (4, 4), (7, 4), (8, 8), (33, 32)])
def test_the_largest_batch_is_found_by_doubling(limit, largest):
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_batch(fits, 4) == largest and len(tried) == len(set(tried))


def test_each_variant_is_timed_at_its_own_largest_batch(memory):
    alive = memory(5)
    records = list(bench_case(StepCase(DIT, 2, largest=True), CPU, 0.01))
    assert [record.variant for record in records] == [OURS, *baselines(CPU)]
    gc.collect()
    assert not alive
    for record in records:
        assert (record.case, record.batch) == ("largest batch", 4)
        assert record.images_per_sec == pytest.approx(4 / record.median_s)


def test_a_wrong_step_at_the_largest_batch_is_no_record(memory, monkeypatch, capsys):
    memory(2)
    monkeypatch.setitem(RECIPES, "official", RECIPES["official"]._replace(average=lambda *_: None))
    records = list(bench_case(StepCase(DIT, 2, largest=True), CPU, 0.01))
    assert [record.variant for record in records] == [OURS, "sdpa-fused", "compile"]
    assert "official at N=2: average of" in capsys.readouterr().err


class FusedAdam(torch.optim.AdamW):
    """Counts in its groups, as NVIDIA's does."""

    def step(self, closure=None):
        count = self.param_groups[0].get("step", 0)
        for state in self.state.values():
            state["step"] = torch.tensor(float(count))
        super().step(closure)
        self.param_groups[0]["step"] = count + 1
        for state in self.state.values():
            del state["step"]


def test_apex_is_a_baseline_on_a_gpu_where_it_is_nvidias(monkeypatch, problem):
    assert list(baselines(CPU)) == ["official", "sdpa-fused", "compile"]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.ModuleType("apex.optimizers"))
    assert list(baselines(GPU)) == ["official", "sdpa-fused", "compile", "compile-graphs"]
    sys.modules["apex.optimizers"].FusedAdam = FusedAdam
    assert list(baselines(GPU))[-1] == "apex"
    trainer = Baseline(problem, baselines(GPU)["apex"])
    for _ in range(2):
        trainer.step()
    evidence = witness(trainer)
    assert evidence.before.taken == 2
    check(problem, evidence, "apex")


def test_a_cpu_measures_a_small_batch_and_a_gpu_every_model_at_two():
    on_cpu, on_gpu = step_cases.step_cases(CPU), step_cases.step_cases(GPU)
    assert [case.group for case in on_cpu if case.usual] == ["step/DiT-tiny/2", "step/DiT-S/2"]
    assert [case.name for case in on_cpu] == ["N=64", *["N=8"] * len(BATCHES)]
    usual = [f"{case.group} {case.name}" for case in on_gpu if case.usual]
    wanted = ["DiT-XL/2 N=128", "DiT-S/2 N=256", "DiT-XL/2 largest batch", "DiT-S/2 largest batch"]
    assert usual == [f"step/{case}" for case in wanted] and len(on_gpu) == 2 * len(BATCHES)
    assert variants_of(on_cpu[0], CPU) == ON_CPU
    pieces = ["no-graph", "no-fused-optimizer", "no-fused-noise-loss", "no-kernels", "recompute-off"]
    assert variants_of(on_gpu[0], GPU) == [OURS, *RECIPES, *pieces]
    assert variants_of(on_gpu[-1], GPU) == [OURS, *RECIPES]


def test_bfloat16_is_measured_on_a_cpu_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(step_ours, "_multiplies_bfloat16", lambda: False)
    assert variants_of(CASE, CPU) == [name for name in ON_CPU if name != IN_BFLOAT16]


def test_a_filter_without_a_case_is_refused():
    with pytest.raises(
        ConfigError, match="filter: given 'DiT-Q', allowed part of a case's name: step/DiT-tiny/2, step/"
    ):
        list(bench_step("DiT-Q"))


def test_no_case_and_no_variant_is_begun_after_the_limit(monkeypatch, capsys):
    assert [record.case for record in bench_step("DiT-S/2", limit=0.0)] == ["matmul"]
    assert "[1/1] step/DiT-S/2 N=8: left out, 0 seconds have passed" in capsys.readouterr().err
    late = iter([False, False, True, *[True] * 9])
    records = list(bench_case(CASE, CPU, 0.01, late=lambda what: next(late)))
    assert [record.variant for record in records] == [OURS, "official"]


def test_the_command_writes_records_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "step_cases", lambda device: [CASE])
    file = tmp_path / "out" / "step.json"
    cli.main(["bench", "step", "--filter", "tiny", "--seconds", "0.01", "--json", str(file)])
    matmul, *records = json.loads(file.read_text())["records"]
    assert (matmul["group"], matmul["case"]) == ("machine", "matmul") and matmul["tflops"] > 0
    names = {"images_per_sec", "tflops", "loss_off", "gradient_off", "median_s", "iqr_s", "runs"}
    assert [record["variant"] for record in records] == ON_CPU and all(names <= record.keys() for record in records)
    assert file.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr()
    assert f"wrote {file}" in printed.out and f"wrote {file.with_suffix('.png')}" in printed.out
    assert printed.err.splitlines() == ["machine matmul", "[1/1] step/DiT-tiny/8 N=4"]


def test_the_table_compares_rates_and_leaves_out_what_nobody_has():
    how: dict[str, Any] = {"backend": "", "iqr_s": 0.1, "runs": 5}
    records = [
        Record("machine", "matmul", "eager", median_s=1.0, tflops=100.0, **how),
        Record("step/X", "largest batch", OURS, median_s=2.0, images_per_sec=64.0, tflops=60.0, batch=128, **how),
        Record("step/X", "largest batch", "official", median_s=2.0, images_per_sec=32.0, tflops=30.0, batch=64, **how),
    ]
    head, product, ours, official, *_ = step_report.table(records).splitlines()
    assert "MFU" not in head and "GiB" not in head and head.endswith("erd-fast x")
    assert product.split()[-1] == "100%"
    assert ours.split()[-2:] == ["60%", "1.00"] and official.split()[-2:] == ["30%", "2.00"]
    assert {"128", "64"} <= set(ours.split()) and {"64", "32"} <= set(official.split())


def test_a_picture_of_nothing_is_a_picture_too():
    assert step_report.picture([])[:4] == b"\x89PNG"
