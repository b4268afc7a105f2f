"""kernels/grad_norm.py in Triton's interpreter against the definition, and as compiled."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from erd_fast.ops.grad_norm import grad_norm_reference
from erd_fast.ops.tensor_table import CHUNK, Slot
from support.parity import hold
from support.triton_interpreter import UNIT, Call, interpret, within_memory

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
aot = pytest.importorskip("support.triton_aot")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 8191, 8192, 8193, 20000)
ALIGNED, MISALIGNED = 8, 1


@dataclass(frozen=True)
class Case:
    """Gradients of all sizes, which take dtypes and places in turn."""

    dtypes: tuple[torch.dtype, ...] = FLOATS
    offsets: tuple[int, ...] = (ALIGNED,)

    def __str__(self) -> str:
        parts = [str(dtype)[6:] for dtype in self.dtypes]
        return " ".join([*parts, *("aligned" if offset == ALIGNED else "misaligned" for offset in self.offsets)])

    def gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(size, generator=generator) * 2.0 ** (number % 5)).to(self.dtypes[number % len(self.dtypes)])
            for number, size in enumerate(SIZES)
        ]

    def call(self) -> Call:
        offsets = (self.offsets[number % len(self.offsets)] for number in range(len(SIZES)))
        return _call([within_memory(*pair) for pair in zip(self.gradients(0), offsets, strict=True)])


CASES = [
    *(Case((dtype,), (offset,)) for dtype in FLOATS for offset in (ALIGNED, MISALIGNED)),
    Case(offsets=(ALIGNED, MISALIGNED)),
]
# What is written into the last element of a tensor -> the norm of them all.
SPECIAL = {torch.nan: torch.nan, torch.inf: torch.inf, -torch.inf: torch.inf}
MANY = 20000  # chunks: more than the last program adds at a time


class Found(NamedTuple):
    norm: Tensor
    partials: Tensor


def _call(gradients: list[Tensor]) -> Call:
    chunks = sum(-(-gradient.numel() // CHUNK) for gradient in gradients)
    outputs = (torch.tensor(torch.nan), torch.full((chunks,), torch.nan))
    return Call("grad_norm", (CHUNK, *outputs), slots=tuple(Slot(gradient) for gradient in gradients))


def _partials(seed: int) -> Tensor:
    return torch.rand(MANY, generator=torch.Generator().manual_seed(seed))


def _special(value: float, dtype: torch.dtype) -> list[Tensor]:
    gradients = [torch.ones(8192), torch.ones(8193, dtype=dtype), torch.ones(7)]
    gradients[1][-1] = value
    return gradients


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Any, Found]:
    calls: dict[Any, Call] = {case: case.call() for case in CASES}
    calls |= {(value, dtype): _call(_special(value, dtype)) for value in SPECIAL for dtype in FLOATS}
    calls["too large"] = _call([torch.ones(7), torch.full((9,), 1e30)])
    calls["empty"] = _call([torch.ones(0), torch.ones(0, 3)])
    calls["zero"] = _call([torch.zeros(9000)])
    nowhere = (torch.zeros((0, 12), dtype=torch.int64), torch.zeros((0, 2), dtype=torch.int32))
    for seed in range(10):
        calls[seed] = Call("grad_norm", (*nowhere, CHUNK, torch.tensor(torch.nan), _partials(seed)))
    found = interpret(list(calls.values()), tmp_path_factory.mktemp("grad_norm"))
    ends = (len(call.arguments) for call in calls.values())
    return {name: Found(*given[end - 2 : end]) for name, given, end in zip(calls, found, ends, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_norm_is_that_of_the_definition(results, case):
    def definition(*gradients: Tensor) -> list[Tensor]:
        return [grad_norm_reference(gradients)]

    hold(lambda *gradients: [results[case].norm], definition, case.gradients, ["norm"], seeds=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_chunk_has_the_squares_of_its_own_elements(results, case):
    chunks = [chunk for gradient in case.gradients(0) for chunk in gradient.double().split(CHUNK) if len(chunk)]
    truth = torch.stack([chunk.square().sum() for chunk in chunks])
    # A rounding of each square; then 32 numbers of a thread one after another and 8 over the threads, and NumPy's
    # pairs of pairs are no deeper.
    assert ((results[case].partials - truth).abs() <= 41 * UNIT * truth).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", SPECIAL)
def test_what_is_not_finite_comes_through(results, value, dtype):
    found = results[value, dtype]
    assert torch.equal(found.norm.nan_to_num(nan=-1.0), torch.tensor(SPECIAL[value]).nan_to_num(nan=-1.0))
    assert found.partials.isfinite().tolist() == [True, True, False, True]


def test_squares_beyond_float32_are_infinite(results):
    assert results["too large"].norm == torch.inf


@pytest.mark.parametrize("name", ["empty", "zero"])
def test_nothing_has_the_norm_zero(results, name):
    assert results[name].norm == 0 and not results[name].partials.any()


@pytest.mark.parametrize("seed", range(10))
def test_many_chunks_are_added_in_float64(results, seed):
    assert results[seed].norm == _partials(seed).double().sum().sqrt().float()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[str]:
    """PTX of both kernels for sm_90."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return [used.ptx for _, used in aot.compile_configuration("grad_norm", 90)]


@pytest.mark.build
def test_aligned_chunks_move_in_vectors_of_16_bytes(compiled):
    """Of 32 elements a thread, eight vectors of float32 and four of each 16-bit type; the other loads are those of the
    table, and single elements of misaligned tensors and last chunks."""
    assert len(re.findall(r"ld\.global\.v4\.b32", compiled[0])) == 8 + 4 + 4
    assert len(re.findall(r"ld\.global\.b32", compiled[0])) == 32 + 2
    assert len(re.findall(r"ld\.global\.b16", compiled[0])) == 32 + 32


@pytest.mark.build
def test_nothing_is_added_in_the_order_in_which_programs_end(compiled):
    assert not any(re.search(r"\b(atom|red)\.", ptx) for ptx in compiled)
