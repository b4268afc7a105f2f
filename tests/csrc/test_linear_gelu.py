"""linear_gelu in CUDA, on a CPU: its kernels emulated, cuBLASLt by a stand-in that does what its documentation says."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.ops import OPS, gelu_mlp, linear_gelu, use_backend
from erd_fast.ops.core.backend import Extension
from support.builds import ROOT, build, source
from support.parity import SEEDS, gradients, hold, no_worse

pytestmark = pytest.mark.build

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (rows, K, H, D): no two alike; whole and broken blocks of 128 columns, few chunks of 32 rows and more than warps.
SIZES = ((37, 24, 40, 16), (70, 16, 136, 8), (1, 8, 16, 24), (300, 16, 8, 24))


class Built:
    """The ops over emulated kernels, in ``torch.ops``, and the stand-in they opened."""

    def __init__(self, ops: Any, stand_in: ctypes.CDLL):
        self.ops, self.stand_in = ops, stand_in

    @property
    def heuristics(self) -> int:
        return self.stand_in.stand_in_heuristics()

    @property
    def multiplications(self) -> int:
        return self.stand_in.stand_in_multiplications()


@pytest.fixture(scope="session")
def built(emulated_ops, stand_in) -> Built:
    return Built(emulated_ops, ctypes.CDLL(str(stand_in)))  # which the ops then find by its name


def test_names_and_layouts_are_those_of_the_header(plan, headers):
    numbers = {
        "SUCCESS": "CUBLAS_STATUS_SUCCESS",
        "NOT_SUPPORTED": "CUBLAS_STATUS_NOT_SUPPORTED",
        "R_32F": "CUDA_R_32F",
        "R_16F": "CUDA_R_16F",
        "R_16BF": "CUDA_R_16BF",
        "COMPUTE_32F": "CUBLAS_COMPUTE_32F",
        "OP_N": "CUBLAS_OP_N",
        "OP_T": "CUBLAS_OP_T",
        "DESC_TRANSA": "CUBLASLT_MATMUL_DESC_TRANSA",
        "DESC_EPILOGUE": "CUBLASLT_MATMUL_DESC_EPILOGUE",
        "DESC_BIAS_POINTER": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
        "DESC_AUX_POINTER": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER",
        "DESC_AUX_LD": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD",
        "GELU_AUX_BIAS": "CUBLASLT_EPILOGUE_GELU_AUX_BIAS",
        "DGELU_BGRAD": "CUBLASLT_EPILOGUE_DGELU_BGRAD",
        "PREF_MAX_WORKSPACE_BYTES": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
        **{f"PREF_MIN_ALIGNMENT_{m}": f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{m}_BYTES" for m in "ABCD"},
    }
    fields = {"algorithm": "algo", "workspace": "workspaceSize", "state": "state", "waves": "wavesCount",
              "reserved": "reserved"}  # fmt: skip
    text = (ROOT / "csrc/cublaslt.h").read_text()
    functions = dict(re.findall(r'find\(opened, "(\w+)", found\.(\w+)\)', text))
    members = re.findall(r"\(\*(\w+)\)\(", text)
    assert sorted(functions.values()) == sorted(members) and len(members) == 10
    declared = re.findall(r"\b([A-Z_0-9]+) = \d+", text)
    assert sorted(declared) == sorted(numbers)
    code = [
        "#include <cublasLt.h>\n#include <type_traits>\n#include <cstddef>\n#include <cublaslt.h>",
        "namespace lt = erd_fast::lt;",
        "template <typename A, typename B> constexpr bool alike = sizeof(A) == sizeof(B)"
        " && std::is_pointer_v<A> == std::is_pointer_v<B>;",
        "template <typename A, typename B> struct Same : std::false_type {};",
        "template <typename R, typename... A, typename S, typename... B> struct Same<R (*)(A...), S (*)(B...)>",
        "    : std::bool_constant<alike<R, S> && (alike<A, B> && ...)> {};",
        *(f"static_assert((long long)lt::{ours} == (long long){theirs});" for ours, theirs in numbers.items()),
        "static_assert(sizeof(lt::Algorithm) == sizeof(cublasLtMatmulAlgo_t));",
        "static_assert(sizeof(lt::Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));",
        *(f"static_assert(offsetof(lt::Heuristic, {ours}) == offsetof(cublasLtMatmulHeuristicResult_t, {theirs}) && "
          f"sizeof(lt::Heuristic::{ours}) == sizeof(cublasLtMatmulHeuristicResult_t::{theirs}));"
          for ours, theirs in fields.items()),
        *(f"static_assert(Same<decltype(lt::Library::{ours}), decltype(&{theirs})>::value);"
          for theirs, ours in functions.items()),
    ]  # fmt: skip
    check = source("layouts.cpp", "\n".join(code) + "\n")
    flags = ["-std=c++17", "-c", *headers, f"-I{ROOT / 'csrc'}"]
    build("layouts.o", lambda output: [plan.compiler, *flags, str(check), "-o", str(output)])


DESCRIBES = """
#include <cstdio>
#include <cublaslt.h>
using namespace erd_fast::lt;
template <typename T> void set(Desc desc, int attribute, T value) {
    check(library().desc_set(desc, attribute, &value, sizeof value), "desc_set");
}
template <typename T> void set(Preference preference, int attribute, T value) {
    check(library().preference_set(preference, attribute, &value, sizeof value), "preference_set");
}
int main() {
    Desc desc;
    Layout layout;
    Preference preference;
    check(library().desc_create(&desc, COMPUTE_32F, R_32F), "desc_create");
    set(desc, DESC_TRANSA, OP_T);
    for (uint32_t epilogue : {GELU_AUX_BIAS, DGELU_BGRAD}) set(desc, DESC_EPILOGUE, epilogue);
    for (int pointer : {DESC_BIAS_POINTER, DESC_AUX_POINTER}) set(desc, pointer, (void*)256);
    set(desc, DESC_AUX_LD, (int64_t)8);
    for (int type : {R_32F, R_16F, R_16BF}) check(library().layout_create(&layout, type, 8, 3, 8), "layout_create");
    check(library().preference_create(&preference), "preference_create");
    set(preference, PREF_MAX_WORKSPACE_BYTES, (uint64_t)1 << 25);
    for (int matrix : {PREF_MIN_ALIGNMENT_A, PREF_MIN_ALIGNMENT_B, PREF_MIN_ALIGNMENT_C, PREF_MIN_ALIGNMENT_D}) {
        set(preference, matrix, (uint32_t)16);
    }
    check(library().preference_destroy(preference), "preference_destroy");
    std::puts(library().status_name(NOT_SUPPORTED));
}
"""


def test_cublaslt_itself_takes_our_descriptors(plan):
    """What it does without a GPU: open, describe, refuse numbers of the wrong size."""
    folder = plan.torch.parent / "nvidia/cu13/lib"
    if not (folder / "libcublasLt.so.13").is_file():
        pytest.skip("no libcublasLt.so.13")
    main = source("describes.cpp", DESCRIBES)
    flags = ["-std=c++17", f"-I{ROOT / 'csrc'}"]
    program = build("describes", lambda output: [plan.compiler, *flags, str(main), "-o", str(output), "-ldl"])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    said = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert said.stdout == "CUBLAS_STATUS_NOT_SUPPORTED\n", said.stderr


def _drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def _forward(built: Built, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    outputs = tuple(_nan(len(x), len(weight), dtype=x.dtype) for _ in range(2))
    built.ops.linear_gelu_fwd(x, weight, bias, "tanh", *outputs)
    return outputs


def _backward(
    built: Built, dy: Tensor, next_weight: Tensor | None, pre: Tensor, again: bool = True
) -> tuple[Tensor, ...]:
    dpre, activation = (_nan(*shape, dtype=pre.dtype) for shape in (pre.shape, pre.shape if again else (0,)))
    dbias = _nan(pre.shape[1], dtype=torch.float32)
    built.ops.linear_gelu_bwd(dy, next_weight, pre, "tanh", dpre, dbias, activation if again else None)
    return dpre, dbias, activation


def _plain_forward(*given: Tensor) -> tuple[Tensor, ...]:
    pre = F.linear(*given)
    return F.gelu(pre, approximate="tanh"), pre


def _plain_backward(dy: Tensor, next_weight: Tensor | None, pre: Tensor) -> tuple[Tensor, ...]:
    dactivation = dy if next_weight is None else dy @ next_weight
    dpre = torch.ops.aten.gelu_backward(dactivation, pre, approximate="tanh")
    return dpre, dpre.sum(0), F.gelu(pre, approximate="tanh")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_forward_gemm_gives_the_activation_and_its_input(built, size, dtype):
    rows, inputs, hidden, _ = size
    before = built.multiplications
    hold(
        lambda *given: _forward(built, *given),
        _plain_forward,
        lambda seed: _drawn(seed, dtype, (rows, inputs), (hidden, inputs), (hidden,)),
        ("activation", "pre"),
    )
    assert built.multiplications == before + SEEDS


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_backward_gemm_gives_the_gradients_of_the_layer_before(built, size, dtype):
    rows, _, hidden, outputs = size
    before = built.multiplications

    def inputs(seed: int) -> tuple[Tensor, ...]:
        dy, next_weight, pre = _drawn(seed, dtype, (rows, outputs), (outputs, hidden), (rows, hidden))
        return dy, next_weight, 3 * pre

    hold(lambda *given: _backward(built, *given), _plain_backward, inputs, ("dpre", "dbias", "activation"))
    assert built.multiplications == before + SEEDS


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_our_own_kernels_do_what_has_no_gemm(built, size, dtype):
    rows, _, hidden, _ = size
    before = built.multiplications

    def inputs(seed: int) -> tuple[Tensor | None, ...]:
        dactivation, pre = _drawn(seed, dtype, (rows, hidden), (rows, hidden))
        return dactivation, None, 3 * pre

    hold(lambda *given: _backward(built, *given), _plain_backward, inputs, ("dpre", "dbias", "activation"))
    dactivation, _, pre = inputs(0)
    full, lean = (_backward(built, dactivation, None, pre, again) for again in (True, False))
    assert torch.equal(full[0], lean[0]) and torch.equal(full[1], lean[1]) and not lean[2].numel()
    assert built.multiplications == before


def test_numbers_in_the_tails_stay_finite(built):
    values = (0.0, -0.0, 9.99, -9.99, 10.01, -10.01, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf)
    pre = torch.tensor([*values, torch.nan, 1.0, 2.0, 3.0])[None]
    dpre, dbias, activation = _backward(built, torch.ones_like(pre), None, pre)
    slopes = [0.5, 0.5, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert torch.equal(dpre.nan_to_num(-9), dbias[None].nan_to_num(-9))
    assert dpre[0, 12].isnan() and activation[0, 12].isnan()
    assert torch.allclose(dpre[0, :12], torch.tensor(slopes, dtype=torch.float32), atol=1e-6, rtol=0)
    assert torch.allclose(activation[0, :12], torch.tensor(values).clamp(min=0), atol=1e-6, rtol=1e-6)


def test_a_shape_is_planned_once(built):
    x, weight, bias = _drawn(0, torch.float32, (19, 8), (24, 8), (24,))
    activation, pre = torch.empty(2, 19, 24)  # the same memory each time: its alignment is part of a plan
    for rows, plans in ((19, 1), (19, 0), (18, 1), (19, 0)):
        before = built.heuristics
        built.ops.linear_gelu_fwd(x[:rows], weight, bias, "tanh", activation[:rows], pre[:rows])
        assert built.heuristics == before + plans
        given = x[:rows], weight, bias
        truth = _plain_forward(*(tensor.double() for tensor in given))[0]
        no_worse([activation[:rows]], [_plain_forward(*given)[0]], [truth])
        activation.fill_(torch.nan)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (77, "cuBLASLt has no algorithm with the epilogue"),
        (78, "cuBLASLt has no algorithm with the epilogue"),
        (79, "cuBLASLt: cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED"),
    ],
)
def test_what_cublaslt_cannot_do_is_an_error(built, rows, message):
    x, weight, bias = _drawn(0, torch.float32, (rows, 8), (24, 8), (24,))
    with pytest.raises(RuntimeError, match=f"linear_gelu: {message}"):
        _forward(built, x, weight, bias)
    with pytest.raises(RuntimeError, match=f"linear_gelu: {message}"):
        _backward(built, x, weight.t().contiguous(), x @ weight.t())


def test_a_missing_library_is_an_error(plan):
    main = source(
        "missing.cpp",
        '#include <cstdio>\n#include "cublaslt.h"\nint main() {\n'
        "    try { erd_fast::lt::library(); } catch (const std::exception& error) { std::puts(error.what()); }\n}\n",
    )
    flags = ["-std=c++17", f"-I{ROOT / 'csrc'}", '-DERD_FAST_CUBLASLT="libcublasLt.so.0", "libcublasLt.so.1"']
    program = build("missing", lambda output: [plan.compiler, *flags, str(main), "-o", str(output), "-ldl"])
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert said == "linear_gelu: cuBLASLt was not found, tried libcublasLt.so.0 and libcublasLt.so.1\n"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(5, 8).half()}, "x must be Float, got Half"),
        ({"weight": torch.zeros(16, 8)}, "weight must have 192 elements, got 128"),
        ({"bias": torch.zeros(23)}, "bias must have 24 elements, got 23"),
        ({"weight": torch.zeros(8, 24).t()}, "weight must be contiguous"),
        ({"weight": torch.zeros(193)[1:].view(24, 8)}, "matrices must begin at a multiple of 16 bytes"),
        ({"approximate": "none"}, "approximate must be tanh, got none"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_arguments_that_would_read_elsewhere_are_refused(built, wrong, message):
    x, weight, bias = _drawn(0, torch.float32, (5, 8), (24, 8), (24,))
    right = {"x": x, "weight": weight, "bias": bias, "approximate": "tanh"}
    right |= {"activation": torch.zeros(5, 24), "pre": torch.zeros(5, 24)}
    with pytest.raises(RuntimeError, match=f"linear_gelu: {message}"):
        built.ops.linear_gelu_fwd(**{**right, **wrong})


class Emulated(Extension):
    """The backend "cuda" with emulated kernels, which take tensors of a CPU."""

    def __init__(self, ops: Any):
        super().__init__("cuda", OPS["linear_gelu"].backends["cuda"].rule)
        self.device = "cpu"
        self.kernels = {"forward": ops.linear_gelu_fwd.default, "backward": ops.linear_gelu_bwd.default}
        self.ran: list[str] = []
        self.failing = ""

    def unavailable(self) -> None:
        return None

    def run(self, direction: Any, device: torch.device, args: dict[str, Any]) -> Any:
        self.ran.append(direction.name)
        if direction.name == self.failing:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return super().run(direction, device, args)

    def _load(self, op: str, direction: str) -> tuple[Any, list[str]]:
        kernel = self.kernels[direction]
        return kernel, [argument.name for argument in kernel._schema.arguments]


@pytest.fixture
def through_cuda(built, monkeypatch) -> Iterator[Emulated]:
    """The op as it runs where there is a GPU."""
    backend = Emulated(built.ops)
    monkeypatch.setitem(OPS["linear_gelu"].backends, "cuda", backend)
    with use_backend(linear_gelu="cuda"):
        yield backend


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("outputs", "products"), [(24, 2), (12, 1)], ids=["even", "odd"])
def test_an_mlp_through_cuda_is_pytorchs(through_cuda, built, recompute, dtype, outputs, products):
    """A next layer of an odd width is multiplied by torch in the backward pass."""
    before = built.multiplications
    shapes = ((2, 9, 16), (40, 16), (40,), (outputs, 40), (outputs,), (2, 9, outputs))

    def inputs(seed: int) -> tuple[Tensor, ...]:
        *leaves, dy = _drawn(seed, dtype, *shapes)
        return (*(leaf.requires_grad_() for leaf in leaves), dy)

    def ours(*given: Tensor) -> Any:
        return gradients(lambda *leaves: [gelu_mlp(*leaves, recompute=recompute)], given[:-1], given[-1:])

    def plain(*given: Tensor) -> Any:
        x, weight, bias, next_weight, next_bias, dy = given
        call = lambda *leaves: [F.linear(F.gelu(F.linear(*leaves[:3]), approximate="tanh"), *leaves[3:])]  # noqa: E731
        return gradients(call, (x, weight, bias, next_weight, next_bias), (dy,))

    hold(ours, plain, inputs, ("y", "dx", "dweight", "dbias", "dnext_weight", "dnext_bias"))
    assert built.multiplications == before + products * SEEDS
    assert through_cuda.ran == ["forward", "backward"] * SEEDS


@pytest.mark.parametrize("fails", [False, True])
def test_the_backward_pass_of_an_mlp_stays_on_its_backend_in_any_thread(through_cuda, fails):
    """Autograd runs backward passes of a GPU in a thread of its own."""
    through_cuda.failing = "backward" if fails else ""
    x, *parameters = _drawn(0, torch.float32, (9, 16), (40, 16), (40,), (24, 40), (24,))
    y = gelu_mlp(x.requires_grad_(), *parameters)
    with ThreadPoolExecutor(1) as pool:
        gradient = pool.submit(torch.autograd.grad, y.sum(), x)
        if fails:
            with pytest.raises(RuntimeError, match="NOT_SUPPORTED") as caught:
                gradient.result()
            remedy = "linear_gelu failed on backend cuda; ERD_FAST_BACKEND=linear_gelu=reference"
            assert f"the backward pass of {remedy}" in caught.value.__notes__[0]
        else:
            assert gradient.result()[0].isfinite().all()
    assert through_cuda.ran == ["forward", "backward"]


def test_a_layer_through_cuda_is_pytorchs(through_cuda):
    shapes = ((2, 9, 16), (40, 16), (40,), (2, 9, 40))

    def inputs(seed: int) -> tuple[Tensor, ...]:
        *leaves, dy = _drawn(seed, torch.bfloat16, *shapes)
        return (*(leaf.requires_grad_() for leaf in leaves), dy)

    def ours(*given: Tensor) -> Any:
        return gradients(lambda *leaves: [linear_gelu(*leaves)], given[:-1], given[-1:])

    def plain(*given: Tensor) -> Any:
        return gradients(lambda *leaves: [F.gelu(F.linear(*leaves), approximate="tanh")], given[:-1], given[-1:])

    hold(ours, plain, inputs, ("activation", "dx", "dweight", "dbias"))
