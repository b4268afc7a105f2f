"""kernels/linear_gelu.py in Triton's interpreter against PyTorch in float64."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.parity import SEEDS, hold
from support.triton_interpreter import Call, interpret

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("tanh", "none")
# (rows, K, H, D): one block, odd sizes, chunks and blocks of columns in part, a width of 8 times an odd number, one.
SIZES = ((37, 24, 40, 16), (70, 7, 13, 3), (70, 16, 300, 8), (33, 8, 24, 5), (1, 1, 1, 1))
EXTREME = (0.0, -0.0, 1e-30, -1e-30, 9.99, -9.99, 10.01, -10.01, 100.0, -100.0, 1e4, -1e4, 3e38, -3e38)


@dataclass(frozen=True)
class Case:
    size: tuple[int, int, int, int]
    dtype: torch.dtype
    approximate: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} {str(self.dtype)[6:]} {self.approximate}"

    def forward_inputs(self, seed: int) -> tuple[Tensor, ...]:
        rows, inputs, hidden, _ = self.size
        return self._drawn(seed, (rows, inputs), (hidden, inputs), (hidden,), scale=inputs**-0.25)

    def backward_inputs(self, seed: int) -> tuple[Tensor, ...]:
        """dy, next_weight, z; z reaches both tails."""
        rows, _, hidden, outputs = self.size
        dy, next_weight, pre = self._drawn(seed, (rows, outputs), (outputs, hidden), (rows, hidden))
        return dy, next_weight, 3 * pre

    def _drawn(self, seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple((scale * torch.randn(shape, generator=generator)).to(self.dtype) for shape in shapes)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Activation and z, by PyTorch."""
        pre = F.linear(*given)
        return F.gelu(pre, approximate=self.approximate), pre

    def backward(self, dy: Tensor, next_weight: Tensor | None, pre: Tensor) -> tuple[Tensor, ...]:
        """Gradients of z and the bias, and the activation, by PyTorch."""
        dactivation = dy if next_weight is None else dy @ next_weight
        dpre = torch.ops.aten.gelu_backward(dactivation, pre, approximate=self.approximate)
        return dpre, dpre.sum(0), F.gelu(pre, approximate=self.approximate)


CASES = [Case(SIZES[0], dtype, form) for dtype in FLOATS for form in FORMS]
EXTREMES = list(CASES)
CASES += [Case(size, *how) for size in SIZES[1:] for how in ((torch.bfloat16, "tanh"), (torch.float32, "none"))]


def _forward(case: Case, given: tuple[Tensor, ...]) -> Call:
    outputs = (torch.full((len(given[0]), len(given[1])), torch.nan, dtype=case.dtype) for _ in range(2))
    return Call("linear_gelu", (*given, case.approximate, *outputs))


def _backward(case: Case, dy: Tensor, next_weight: Tensor | None, pre: Tensor, *, again: bool, here: bool) -> Call:
    """``here``: the gradient of z takes the place of ``dy``."""
    dpre, activation = (torch.full_like(pre, torch.nan) for _ in range(2))
    dbias = torch.full((pre.shape[1],), torch.nan)
    outputs = (dy if here else dpre, dbias, activation if again else None)
    return Call("linear_gelu", (dy, next_weight, pre, case.approximate, *outputs), "backward")


def _extremes(case: Case) -> Tensor:
    return torch.tensor((*EXTREME, torch.inf, -torch.inf, torch.nan), dtype=case.dtype)[:, None]


def _calls(case: Case, seed: int) -> dict[str, Call]:
    dy, next_weight, pre = case.backward_inputs(seed)
    alone = torch.roll(pre, 1, 0) / 3
    calls = {
        "forward": _forward(case, case.forward_inputs(seed)),
        "mlp": _backward(case, dy, next_weight, pre, again=True, here=False),
        "alone": _backward(case, alone, None, pre, again=True, here=False),
    }
    if seed == 0:
        calls["mlp lean"] = _backward(case, dy, next_weight, pre, again=False, here=False)
        calls["alone here"] = _backward(case, alone.clone(), None, pre, again=False, here=True)
    return calls


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[..., Any]:
    """``results(case, name, seed)``: the arguments of a call after it."""
    calls = {(str(case), seed, name): call for case in CASES for seed in range(SEEDS)
             for name, call in _calls(case, seed).items()}  # fmt: skip
    for case in EXTREMES:
        values, one = _extremes(case), torch.ones(1, 1, dtype=case.dtype)
        calls[str(case), 0, "extremes"] = _forward(case, (values, one, torch.zeros(1, dtype=case.dtype)))
        calls[str(case), 0, "extremes back"] = _backward(
            case, torch.ones_like(values), None, values, again=True, here=False
        )
    found = dict(zip(calls, interpret(list(calls.values()), tmp_path_factory.mktemp("linear_gelu")), strict=True))
    return lambda case, name, seed=0: found[str(case), seed, name]


def _in_turn(results: Callable[..., Any], case: Case, name: str, outputs: slice) -> Callable[..., Any]:
    seeds = iter(range(SEEDS))
    return lambda *given: results(case, name, next(seeds))[outputs]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_activation_and_what_is_kept_are_those_of_the_definition(results, case):
    hold(_in_turn(results, case, "forward", slice(4, None)), case.forward, case.forward_inputs, ("activation", "pre"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_definition(results, case):
    names = ("dpre", "dbias", "activation")
    hold(_in_turn(results, case, "mlp", slice(4, None)), case.backward, case.backward_inputs, names)

    def alone(seed: int) -> tuple[Tensor | None, ...]:
        _, _, pre = case.backward_inputs(seed)
        return torch.roll(pre, 1, 0) / 3, None, pre

    hold(_in_turn(results, case, "alone", slice(4, None)), case.backward, alone, names)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neither_the_place_nor_the_activation_changes_the_bits(results, case):
    for one, other in (("mlp", "mlp lean"), ("alone", "alone here")):
        for output in (4, 5):
            assert torch.equal(results(case, one)[output], results(case, other)[output])
    assert results(case, "mlp lean")[6] is None
    for name, places in {"mlp": (0, 1, 2), "alone": (0, 2), "forward": (0, 1, 2)}.items():
        before = _calls(case, 0)[name].arguments
        assert all(torch.equal(results(case, name)[place], before[place]) for place in places)


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_no_number_overflows(results, case):
    values = _extremes(case)[:, 0]
    *_, activation, pre = results(case, "extremes")
    *_, dpre, dbias, again = results(case, "extremes back")
    assert torch.equal(pre[:-1, 0], values[:-1]) and pre[-1].isnan() and dbias.isnan()
    assert torch.equal(activation, again) or activation[-1].isnan()
    wide = values[:-3].double().requires_grad_()
    truth = F.gelu(wide, approximate=case.approximate)
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    finite = wide.isfinite() & slope.isfinite()  # of PyTorch, which multiplies infinities by 0
    # One rounding to the dtype, which Triton's interpreter does by cutting off; 1e-6 of GELU's own functions.
    close = {"rtol": torch.finfo(case.dtype).eps + 1e-6, "atol": 1e-6}
    for found in (activation[:-3, 0], again[:-3, 0]):
        torch.testing.assert_close(found.double()[finite], truth[finite].detach(), **close)
    torch.testing.assert_close(dpre[:-3, 0].double()[finite], slope[finite], **close)
    for found, low, high in ((activation, 0.0, torch.inf), (again, 0.0, torch.inf), (dpre, 0.0, 1.0)):
        infinite, minus_infinite, missing = found[-3:, 0].double()
        assert infinite == high and abs(minus_infinite - low) < 1e-20 and missing.isnan()
        assert not found[:-3].isnan().any()


@pytest.mark.build
def test_whole_rows_of_eight_move_as_vectors():
    aot = pytest.importorskip("support.triton_aot")
    for name, kernels in {"linear_gelu": 1, "linear_gelu backward again": 2, "linear_gelu backward 24 wide": 2}.items():
        found = aot.compile_configuration(name, 90)
        assert len(found) == kernels
        loads = re.findall(r"ld\.global\S*", found[0][1].ptx)
        assert loads and all(".v4.b32" in load for load in loads), (name, loads)
