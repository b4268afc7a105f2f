"""model_cases: whole models and single blocks, forward and backward."""

import pytest
import torch

from erd_fast.benchmark import ops as bench
from erd_fast.benchmark.model_cases import MODEL_NAMES, ModelCase, model_cases
from erd_fast.benchmark.ops import bench_case, check, truth, variants_of
from erd_fast.benchmark.workload import Variant, call_of
from erd_fast.errors import RunError
from erd_fast.models import create_model, model_flops
from erd_fast.ops import OPS, Recording

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EAGER, OURS = Variant("eager"), Variant("erd-fast")


@pytest.fixture
def eager_in_place_of_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("case", [ModelCase("DiT-tiny/8", 3), ModelCase("U-ViT-tiny", 3, block=True)], ids=str)
def test_variants_agree_and_a_result_that_is_off_is_refused(case):
    workload = case.build(CPU)
    expected = truth(workload)
    for variant in (EAGER, OURS):
        check(case, workload, variant, call_of(workload, variant)(0), expected)
    assert all(value.norm() > 0 for value in expected)
    for number in range(len(expected)):
        found = (*expected[:number], 1.01 * expected[number], *expected[number + 1 :])
        with pytest.raises(RunError, match=rf"bench: {case.group} N=3, erd-fast: \S+ is .* off, allowed"):
            check(case, workload, OURS, found, expected)


def test_a_kernel_with_a_wrong_gradient_is_not_timed(make_wrong, eager_in_place_of_compile):
    make_wrong(OPS["residual_ada_layer_norm"].backward, 1.01, "dgate")
    with pytest.raises(RunError, match=r"block/DiT-tiny/8 N=2, erd-fast: t_embedder.mlp.0.weight is"):
        list(bench_case(ModelCase("DiT-tiny/8", 2, block=True), CPU, 0.01))


def test_truth_of_many_images_is_that_of_a_few_at_a_time():
    case = ModelCase("DiT-tiny/8", 11, block=True)
    workload = case.build(CPU)
    check(case, workload, EAGER, call_of(workload, EAGER)(0), truth(workload))


def test_records_have_images_and_flops_and_the_backends_that_ran(eager_in_place_of_compile):
    case = ModelCase("DiT-tiny/8", 2, block=True)
    records = list(bench_case(case, CPU, 0.01))
    assert [record.variant for record in records] == ["eager", "compile", "erd-fast"]
    assert [bool(record.backend) for record in records] == [False, False, True]
    flops = model_flops(create_model("DiT-tiny/8", device="meta", depth=1))
    for record in records:
        assert (record.group, record.case, record.gb_per_s) == ("block/DiT-tiny/8", "N=2", None)
        assert 0 <= record.loss_off < 1e-5 and 0 <= record.gradient_off < 1e-5
        assert record.images_per_sec == pytest.approx(2 / record.median_s)
        assert record.tflops == pytest.approx(3 * 2 * flops / record.median_s / 1e12)


def test_backends_that_ran_are_named_in_the_form_that_use_backend_takes():
    recording = Recording()
    assert bench.backends_used(recording) == ""
    for op, backend in [
        ("ada_layer_norm", "triton"),
        ("residual_ada_layer_norm", "triton"),
        ("linear_gelu", "triton"),
        ("linear_gelu", "cuda"),
    ]:
        recording.note(op, backend, {})
    assert bench.backends_used(recording) == "triton,linear_gelu=cuda"


def test_a_cpu_measures_the_smallest_model_and_a_gpu_all():
    on_cpu, on_gpu = model_cases(CPU), model_cases(GPU)
    assert [f"{case.group} {case.name}" for case in on_cpu] == ["block/DiT-S/2 N=8", "model/DiT-S/2 N=8"]
    block, model = ([variant.name for variant in variants_of(case, CPU)] for case in on_cpu)
    assert (block, model) == (["eager", "compile", "erd-fast"], ["eager", "erd-fast"])
    assert {case.group for case in on_gpu} == {f"{kind}/{name}" for kind in ("block", "model") for name in MODEL_NAMES}
    usual = [f"{case.group} {case.name}" for case in on_gpu if case.usual]
    assert usual == ["block/DiT-XL/2 N=64", "model/DiT-XL/2 N=64"]
    assert all(case.called != case.block for case in on_gpu)
