"""kernels/ada_layer_norm.py in Triton's interpreter against the definition in float64; the rest of its
kernels, which are residual_ada_layer_norm's, is tested there."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops.ada_layer_norm import ada_layer_norm_reference
from support.parity import SEEDS, gradients, hold
from support.triton_interpreter import Call, interpret

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
aot = pytest.importorskip("support.triton_aot")

FLOAT, HALF = torch.float32, torch.bfloat16
OP, EPS = "ada_layer_norm", 1e-5
NAMES = ("y", "dx", "dshift", "dscale")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]
    stream: torch.dtype = FLOAT
    inner: torch.dtype = HALF
    offset: float = 1.0

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.stream)[6:]} {str(self.inner)[6:]} {self.offset}"

    def inputs(self, seed: int) -> list[Tensor]:
        """x, shift, scale, dy. Shift and scale are float32, of values that ``inner`` holds."""
        generator = torch.Generator().manual_seed(seed)
        samples, _, width = self.shape
        x = (torch.randn(self.shape, generator=generator) * 3 + 2).to(self.stream)
        vectors = torch.randn(2, samples, width, generator=generator).to(self.inner).float()
        dy = torch.randn(self.shape, generator=generator).to(self.inner)
        return [x.requires_grad_(), *(vector.requires_grad_() for vector in vectors), dy]

    def definition(self, x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> list[Tensor | None]:
        dtype = x.dtype if x.dtype == torch.float64 else self.inner

        def call(*given: Tensor) -> list[Tensor]:
            return [ada_layer_norm_reference(*given, offset=self.offset, eps=EPS, dtype=dtype)]

        return gradients(call, (x, shift, scale), (dy,))


MANY = Case((2, 17, 72))  # in parts: see _small_parts
CASES = [
    Case((2, 2, 72), FLOAT, FLOAT),
    Case((2, 2, 72), offset=0.0),
    Case((2, 2, 1152), HALF, HALF),
    Case((3, 1, 1), torch.float16, FLOAT),
    Case((2, 1, 5000), FLOAT, torch.float16),
]


def _small_parts() -> list[Call]:
    """From here on a few rows are many: four to a program forward, two backward; so 17 are nine parts, one of them of a
    single row."""
    return [Call("residual_ada_layer_norm", how, "__setattr__") for how in (("_FEW_ROWS", 0), ("_CHUNK", 2))]


def _two_passes(case: Case, given: list[Tensor], samples: slice = slice(None)) -> list[Call]:
    """A forward call, and a backward call that takes its statistics; vectors are chunks of a projection."""
    x, shift, scale, dy = (value.detach() for value in given)
    samples_, tokens, width = case.shape
    projection = torch.cat([torch.full((samples_, 8), torch.nan), shift, scale], 1).to(case.inner)
    shift, scale = projection[samples, 8:].chunk(2, dim=1)
    x, dy = x[samples], dy[samples]
    y, dx = torch.full_like(dy, torch.nan), torch.full_like(x, torch.nan)
    mean, rstd = torch.full((2, len(x), tokens), torch.nan)
    dshift, dscale = torch.full((2, len(x), width), torch.nan)
    return [
        Call(OP, (x, shift, scale, case.offset, EPS, y, mean, rstd)),
        Call(OP, (dy, x, scale, case.offset, mean, rstd, dx, dshift, dscale), "backward"),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Any, tuple[Any, ...]]:
    calls: dict[Any, Call] = {}
    for case in [*CASES, MANY]:
        if case is MANY:
            calls |= {("parts", number): call for number, call in enumerate(_small_parts())}
        for seed in range(SEEDS):
            calls |= {(case, seed, number): call for number, call in enumerate(_two_passes(case, case.inputs(seed)))}
    alone = _two_passes(MANY, MANY.inputs(0), slice(1, 2))
    calls |= {("alone", number): call for number, call in enumerate(alone)}
    return dict(zip(calls, interpret(list(calls.values()), tmp_path_factory.mktemp(OP)), strict=True))


@pytest.mark.parametrize("case", [*CASES, MANY], ids=str)
def test_values_and_gradients_are_those_of_the_definition(results, case):
    seeds = iter(range(SEEDS))

    def held(*given: Tensor) -> list[Tensor | None]:
        seed = next(seeds)
        return [results[case, seed, 0][5], *results[case, seed, 1][6:]]

    hold(held, case.definition, case.inputs, NAMES)


def test_a_sample_is_the_same_bits_in_any_batch(results):
    for number, outputs in enumerate((slice(5, None), slice(6, None))):
        for whole, alone in zip(results[MANY, 0, number][outputs], results["alone", number][outputs], strict=True):
            assert torch.equal(whole[1:2], alone)


def _launched(case: Case, given: list[Tensor] | None = None, samples: slice = slice(None)) -> list[Any]:
    from erd_fast.kernels import ada_layer_norm

    def call() -> None:
        for one in _two_passes(case, given or case.inputs(0), samples):
            getattr(ada_layer_norm, one.function)(*one.arguments)

    return [launch for launch in aot.launches(call) if "VEC" in launch.arguments]


@pytest.mark.parametrize(
    ("width", "stream", "inner", "elements"),
    [
        (1152, FLOAT, HALF, 4),
        (1152, HALF, HALF, 8),
        (100, HALF, HALF, 4),
        (50, FLOAT, HALF, 2),
        (1153, HALF, HALF, 1),
    ],
)
def test_accesses_are_as_wide_as_every_row_allows(width, stream, inner, elements):
    case = Case((3, 2, width), stream, inner)
    for samples in (slice(None), slice(1, 2)):
        assert [launch.arguments["VEC"] for launch in _launched(case, samples=samples)] == [elements] * 2


def test_a_stream_that_lies_unaligned_is_read_element_by_element():
    case = Case((2, 3, 72), HALF, HALF)
    given = case.inputs(0)
    room = torch.zeros(given[0].numel() + 1, dtype=HALF)
    given[0] = room[1:].view(case.shape).copy_(given[0].detach())
    assert [launch.arguments["VEC"] for launch in _launched(case, given)] == [1, 1]


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 256, 258])
def test_how_rows_are_parted_is_a_matter_of_tokens(tokens):
    chunks = set()
    for samples in (1, 3):
        _, backward = _launched(Case((samples, tokens, 8)))
        rows, parts = backward.arguments["ROWS"], backward.arguments["chunks"]
        assert rows <= 32 and (parts - 1) * rows < tokens <= parts * rows
        chunks.add((rows, parts))
    assert len(chunks) == 1


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_no_tokens_have_no_gradient(shape):
    from erd_fast.kernels import ada_layer_norm

    backward = _two_passes(Case(shape), Case(shape).inputs(0))[1]
    ada_layer_norm.backward(*backward.arguments)
    assert not any(sums.any() for sums in backward.arguments[7:])
