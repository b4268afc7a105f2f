"""block_cases: the ops of a transformer block, forward and backward, beside what models write."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from erd_fast.benchmark import block_cases
from erd_fast.benchmark.block_cases import BLOCK_OPS, WIDTHS, BlockOpCase
from erd_fast.benchmark.ops import bench_case, check, truth, variants_of
from erd_fast.benchmark.workload import Backward, Variant, Workload, call_of, running
from erd_fast.errors import RunError
from erd_fast.ops import OPS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODES = ("forward", "backward")
NORMS = BLOCK_OPS[:2]
ONE_PASS = [pytest.param(op, mode, id=f"{op}-{mode}") for op in BLOCK_OPS for mode in MODES]
RESULTS = {"ada_layer_norm": (1, 3), "residual_ada_layer_norm": (2, 5), "linear_gelu": (1, 5)}


@pytest.fixture(autouse=True)
def two_copies(monkeypatch):
    monkeypatch.setattr(block_cases, "copies_past_cache", lambda _: 2)


@pytest.fixture
def gpu_dtypes(monkeypatch):
    monkeypatch.setattr(block_cases, "_dtypes", lambda device: (torch.float32, torch.bfloat16))


@pytest.fixture
def eager_in_place_of_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def small(op: str, mode: str, *, uvit: bool = False) -> BlockOpCase:
    return BlockOpCase(op, mode, 2, 32, uvit)


def agreed(case: BlockOpCase) -> tuple[torch.Tensor, ...]:
    """What all variants of a case give."""
    workload = case.build(CPU)
    expected = truth(workload)
    for variant in variants_of(case, CPU):
        with running(workload, variant):
            check(case, workload, variant, call_of(workload, variant)(0), expected)
    return expected


@pytest.mark.parametrize("uvit", [False, True], ids=["dit", "uvit"])
@pytest.mark.parametrize(("op", "mode"), ONE_PASS)
def test_variants_agree(op, mode, uvit, eager_in_place_of_compile):
    expected = agreed(small(op, mode, uvit=uvit))
    gates = uvit and op == "residual_ada_layer_norm" and mode == "backward"  # a U-ViT has none
    assert len(expected) == RESULTS[op][MODES.index(mode)] - gates
    assert all(value.dtype == torch.float32 and value.std() > 0 for value in expected)


@pytest.mark.parametrize("uvit", [False, True], ids=["dit", "uvit"])
@pytest.mark.parametrize(("op", "mode"), ONE_PASS)
def test_variants_agree_in_the_dtypes_of_a_gpu(op, mode, uvit, gpu_dtypes, eager_in_place_of_compile):
    dtypes = [value.dtype for value in agreed(small(op, mode, uvit=uvit))]
    wide, narrow = torch.float32, torch.bfloat16
    forward = {"ada_layer_norm": [narrow], "residual_ada_layer_norm": [wide, narrow], "linear_gelu": [narrow]}
    own = {False: [narrow] * 2, True: [wide] * 2}[uvit]
    backward = {
        "ada_layer_norm": [wide, *own],
        "residual_ada_layer_norm": [wide, narrow, *([] if uvit else [narrow]), *own],
        "linear_gelu": [narrow] * 5,
    }
    assert dtypes == (forward if mode == "forward" else backward)[op]


@pytest.mark.parametrize(("op", "mode"), ONE_PASS)
def test_a_result_that_is_off_is_refused(op, mode):
    case = small(op, mode)
    workload = case.build(CPU)
    expected = truth(workload)
    for variant in (Variant("eager"), Variant("erd-fast", "reference")):
        for number, value in enumerate(expected):
            for wrong in (1.001 * value, value.double(), value[None], torch.full_like(value, float("nan"))):
                found = (*expected[:number], wrong, *expected[number + 1 :])
                with pytest.raises(RunError, match=rf"bench: {case.group} {case.name}, .*: result {number} is .* off"):
                    check(case, workload, variant, found, expected)


@pytest.mark.parametrize("op", BLOCK_OPS)
def test_a_backend_whose_gradients_are_wrong_is_not_timed(op, make_wrong, eager_in_place_of_compile):
    make_wrong(OPS[op].backward, 1.01)
    with pytest.raises(RunError, match=f"ops/{op} .* backward, reference: result 0"):
        list(bench_case(small(op, "backward"), CPU, 0.01))


@pytest.mark.parametrize("op", BLOCK_OPS)
def test_backward_is_timed_without_the_forward_pass(op, monkeypatch):
    forwards = []
    body = OPS[op].forward.body
    monkeypatch.setattr(OPS[op].forward, "body", lambda **args: forwards.append(1) or body(**args))
    workload = small(op, "backward").build(CPU)
    variant = Variant("erd-fast", "reference")
    with running(workload, variant):
        call = call_of(workload, variant)
        results = [call(copy) for copy in (0, 1, 0, 1, 0)]
    assert len(forwards) == workload.copies == 2
    for first, again, other in zip(results[0], results[2], results[1], strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.build
def test_a_compiled_backward_pass_can_be_repeated(tmp_path, monkeypatch):
    """Also where the compiler's cache has one with donated buffers, which a run without a kept graph left there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    workload = products()
    x, *matrices = inputs = workload.backward.inputs[0]
    (once,) = call_of(dataclasses.replace(workload, backward=None), Variant("compile"))(0)
    torch.autograd.grad(once, inputs, torch.ones_like(once))
    torch.compiler.reset()
    with running(workload, Variant("compile")):
        call = call_of(workload, Variant("compile"))
        first, again = call(0), call(0)
    (y,) = products_of(x, *matrices)
    wanted = torch.autograd.grad(y, inputs, torch.ones_like(y))
    for found in (first, again):
        assert all(map(torch.allclose, found, wanted))


def products_of(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor]:
    """Their backward pass needs a number of the forward pass, and no C++ compiler."""
    return ((x @ first) @ second,)


def products() -> Workload:
    inputs = tuple(torch.randn(4, 4, requires_grad=True) for _ in range(3))
    backward = Backward([inputs], [(torch.ones(4, 4),)])

    def baseline(wrap):
        wrapped = wrap(products_of)
        return lambda copy: wrapped(*inputs)

    return Workload(1, lambda copy: products_of(*inputs), baseline, lambda *_: iter(()), backward=backward)


@pytest.mark.parametrize("op", NORMS)
def test_modulations_are_chunks_of_a_wide_projection(op):
    backward = small(op, "backward").build(CPU).backward
    assert backward is not None
    chunks = [tensor for tensor in backward.inputs[0] if tensor.dim() == 2]
    assert len(chunks) == {"ada_layer_norm": 2, "residual_ada_layer_norm": 3}[op]
    assert {tensor.stride() for tensor in chunks} == {(6 * 32, 1)} and len({t.data_ptr() for t in chunks}) == len(
        chunks
    )


@pytest.mark.parametrize(
    ("op", "mode", "by_element"),
    [
        ("ada_layer_norm", "forward", 4 + 2),
        ("ada_layer_norm", "backward", 4 + 4 + 2),
        ("residual_ada_layer_norm", "forward", 4 + 4 + 2 + 2),
        ("residual_ada_layer_norm", "backward", 4 + 4 + 4 + 2 + 2 + 2),
    ],
)
def test_bytes_are_those_of_a_float32_stream_with_bfloat16_branches(op, mode, by_element, gpu_dtypes):
    workload = small(op, mode).build(CPU)
    assert workload.bytes_moved == 2 * 256 * (32 * by_element + 8) and workload.flops is None


@pytest.mark.parametrize(("mode", "products"), [("forward", 2), ("backward", 4)])
def test_flops_of_the_mlp_are_its_products(mode, products):
    workload = small("linear_gelu", mode).build(CPU)
    assert workload.flops == products * 2 * (2 * 256) * 32 * 128 and workload.bytes_moved is None


def test_every_width_is_measured_on_a_gpu_and_two_on_a_cpu():
    on_cpu, on_gpu = block_cases.block_cases(CPU), block_cases.block_cases(GPU)
    assert {(case.width, case.size) for case in on_cpu} == {(384, 8), (1152, 8)}
    assert {(case.width, case.size) for case in on_gpu} == {(width, size) for width in WIDTHS for size in (8, 64, 256)}
    for cases in (on_cpu, on_gpu):
        assert {(case.op, case.mode) for case in cases if case.usual} == {
            (op, mode) for op in BLOCK_OPS for mode in MODES
        }
        assert {(case.width, case.tokens) for case in cases if case.uvit} == {(1152, 258)}
        assert len({(case.group, case.name) for case in cases}) == len(cases)
    assert all(case.usual for case in on_cpu) and not all(case.usual for case in on_gpu)
    names = [f"{case.group} {case.name}" for case in on_gpu]
    assert "ops/ada_layer_norm D=1152 T=256 N=8 forward" in names
    assert "ops/residual_ada_layer_norm affine D=1152 T=258 N=64 backward" in names
    assert "ops/linear_gelu erf D=1152 T=258 N=64 forward" in names


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins of the two projects, which compute what PyTorch does."""
    apex = types.ModuleType("apex.normalization.fused_layer_norm")
    apex.fused_layer_norm = lambda x, shape, eps: F.layer_norm(x, shape, eps=eps)
    apex.fused_layer_norm_affine = lambda x, weight, bias, shape, eps: F.layer_norm(x, shape, weight, bias, eps)
    liger = types.ModuleType("liger_kernel.ops.layer_norm")
    liger.LigerLayerNormFunction = types.SimpleNamespace(
        apply=lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    )
    modules = {module.__name__: module for module in (apex, liger)}
    for name in ("apex", "apex.normalization", "fused_layer_norm_cuda", "liger_kernel", "liger_kernel.ops"):
        modules[name] = types.ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for load in (block_cases._apex, block_cases._liger):
        load.cache_clear()
    yield modules
    for load in (block_cases._apex, block_cases._liger):
        load.cache_clear()


@pytest.mark.parametrize("uvit", [False, True], ids=["dit", "uvit"])
@pytest.mark.parametrize("op", NORMS)
def test_layer_norms_of_other_projects_are_compared_where_they_are_installed(op, uvit, installed, monkeypatch):
    case = small(op, "backward", uvit=uvit)
    assert case.baselines(GPU) == ("eager", "compile", "apex", "liger") and case.baselines(CPU) == ("eager", "compile")
    norms = block_cases._library_norms(GPU)
    monkeypatch.setattr(block_cases, "_library_norms", lambda device: norms)
    workload = case.build(CPU)
    for name in ("apex", "liger"):
        check(case, workload, Variant(name), call_of(workload, Variant(name))(0), truth(workload))


def test_another_project_of_apex_name_is_not_taken(installed):
    del installed["apex.normalization.fused_layer_norm"].fused_layer_norm
    assert list(block_cases._library_norms(GPU)) == ["liger"]
    del sys.modules["liger_kernel.ops.layer_norm"]
    block_cases._liger.cache_clear()
    assert list(block_cases._library_norms(GPU)) == []
