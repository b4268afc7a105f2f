"""kernels/residual_ada_layer_norm.py in Triton's interpreter against the definition in float64, and as compiled."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops.residual_ada_layer_norm import residual_ada_layer_norm_reference
from support.parity import SEEDS, gradients, hold
from support.triton_interpreter import UNIT, Call, interpret

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
aot = pytest.importorskip("support.triton_aot")

FLOAT, HALF = torch.float32, torch.bfloat16
OP, EPS = "residual_ada_layer_norm", 1e-6
NAMES = ("x_out", "y", "dx", "dbranch", "dshift", "dscale", "dgate")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]
    stream: torch.dtype = FLOAT
    inner: torch.dtype = HALF
    gated: bool = True
    dx_out: bool = True
    affine: bool = False  # one weight and bias for all samples

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.stream)[6:], str(self.inner)[6:]]
        parts += [name for name in ("gated", "dx_out", "affine") if getattr(self, name) != getattr(Case, name)]
        return " ".join(parts)

    def inputs(self, seed: int) -> list[Tensor | None]:
        """x, branch, shift, scale, gate, dx_out, dy. The vectors are float32, of values that ``inner`` holds."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)

        samples, _, width = self.shape
        x = (drawn(*self.shape, dtype=FLOAT, grad=False) * 3 + 2).to(self.stream).requires_grad_()
        branch = drawn(*self.shape, dtype=self.inner)
        shift, scale, gate = (
            drawn(1 if self.affine else samples, width, dtype=self.inner, grad=False).float().repeat(
                samples if self.affine else 1, 1
            )
            for _ in range(3)
        )  # fmt: skip
        dx_out = drawn(*self.shape, dtype=self.stream, grad=False) if self.dx_out else None
        dy = drawn(*self.shape, dtype=self.inner, grad=False)
        vectors = [shift.requires_grad_(), scale.requires_grad_(), gate.requires_grad_() if self.gated else None]
        return [x, branch, *vectors, dx_out, dy]

    def definition(self, x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, gate: Any, *douts: Any) -> Any:
        dtype = x.dtype if x.dtype == torch.float64 else self.inner

        def call(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None) -> list[Tensor]:
            offset = float(not self.affine)
            outputs = residual_ada_layer_norm_reference(
                x, branch, gate, shift, scale, offset=offset, eps=EPS, dtype=dtype
            )
            return list(outputs)

        found = gradients(call, (x, branch, shift, scale, gate), douts)
        return found if self.gated else [*found, None]


CASES = [
    Case((2, 2, 72), FLOAT, FLOAT),
    Case((2, 2, 72)),
    Case((2, 2, 72), HALF, HALF),
    Case((2, 2, 72), torch.float16, torch.float16),
    Case((2, 2, 72), FLOAT, FLOAT, gated=False, affine=True),
    Case((2, 1, 72), gated=False, dx_out=False),
    Case((2, 2, 100), HALF, torch.float16, dx_out=False),
    Case((3, 1, 5), HALF),
    Case((2, 1, 384)),
    Case((2, 1, 512), HALF, HALF),
    Case((2, 2, 1152)),
    Case((2, 1, 1280), FLOAT, FLOAT, affine=True),
]


def poisoned(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    """NaN, and a row more of it behind."""
    rows = torch.Size(shape).numel() // shape[-1]
    return torch.full((rows + 1, shape[-1]), torch.nan, dtype=dtype)[:-1].view(shape)


def behind(output: Tensor) -> Tensor:
    end = output.storage_offset() + output.numel()
    return torch.as_strided(output, (output.shape[-1],), (1,), end)


def vectors(case: Case, *given: Tensor | None) -> list[Tensor | None]:
    """As models have them: side by side in the rows of one wide projection, or one row for all samples."""
    samples, _, width = case.shape
    present = [vector for vector in given if vector is not None]
    wide = torch.cat([torch.full((samples, 8), torch.nan), *present], 1).to(case.inner)
    chunks = iter(wide[:, 8:].chunk(len(present), dim=1))
    rows = [None if vector is None else next(chunks) for vector in given]
    return [row[:1].expand(samples, width) if case.affine and row is not None else row for row in rows]


def two_passes(case: Case, given: list[Any]) -> list[Call]:
    """A forward call, and a backward call that takes its statistics."""
    x, branch, *modulation, dx_out, dy = (value if value is None else value.detach() for value in given)
    shift, scale, gate = vectors(case, *modulation)
    offset = float(not case.affine)
    mean, rstd = poisoned(*case.shape[:2]), poisoned(*case.shape[:2])
    outputs = (poisoned(*case.shape, dtype=case.stream), poisoned(*case.shape, dtype=case.inner), mean, rstd)
    dstreams = (poisoned(*case.shape, dtype=case.stream), poisoned(*case.shape, dtype=case.inner))
    dgate, dshift, dscale = (poisoned(case.shape[0], case.shape[2]) for _ in range(3))
    backward = (dx_out, dy, x, branch, gate, None, None, scale, offset, mean, rstd, *dstreams)
    return [
        Call(OP, (x, branch, gate, shift, scale, offset, EPS, *outputs)),
        Call(OP, (*backward, dgate if case.gated else None, dshift, dscale), "backward"),
    ]


STREAMS = (FLOAT, HALF, torch.float16)


def _two_branches(stream: torch.dtype, gated: bool) -> dict[str, Call]:
    """The second branch of a block, whose x is given, or given as what the first one made it of."""
    case = Case((2, 1, 72), stream)
    first, second = ([value if value is None else value.detach() for value in case.inputs(seed)] for seed in (7, 8))
    x, branch, *others = first
    shift, scale, gate = vectors(case, *others[:3])
    before_gate = vectors(case, second[4])[0] if gated else None
    made, y, again = (poisoned(*case.shape, dtype=dtype) for dtype in (stream, HALF, HALF))
    spare = poisoned(*case.shape, dtype=HALF)
    statistics = [poisoned(*case.shape[:2]) for _ in range(2)]
    lost = [poisoned(*case.shape[:2]) for _ in range(2)]
    common = (shift, scale, 1.0, EPS)
    calls = {
        "first": Call(OP, (x, second[1], before_gate, *common, made, spare, *lost)),
        "second": Call(OP, (made, branch, gate, *common, poisoned(*case.shape, dtype=stream), y, *statistics)),
        "again": Call(OP, (made, branch, gate, *common, None, again, *lost)),
    }
    for name, source in {"given": (made, None, None), "rebuilt": (x, second[1], before_gate)}.items():
        outputs = [poisoned(*case.shape, dtype=dtype) for dtype in (stream, HALF)]
        outputs += [poisoned(case.shape[0], case.shape[2]) for _ in range(3)]
        arguments = (others[3], others[4], source[0], branch, gate, *source[1:], scale, 1.0, *statistics, *outputs)
        calls[name] = Call(OP, arguments, "backward")
    return calls


TWO = [(stream, gated) for stream in STREAMS for gated in (True, False)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Any, tuple[Any, ...]]:
    calls = {(case, seed, number): call for case in CASES for seed in range(SEEDS)
             for number, call in enumerate(two_passes(case, case.inputs(seed)))}  # fmt: skip
    every: dict[Any, Call] = {**calls}
    for how in TWO:
        every |= {(*how, name): call for name, call in _two_branches(*how).items()}
    return dict(zip(every, interpret(list(every.values()), tmp_path_factory.mktemp(OP)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(results, case):
    seeds = iter(range(SEEDS))

    def held(*given: Tensor) -> list[Tensor | None]:
        seed = next(seeds)
        x_out, y = results[case, seed, 0][7:9]
        dx, dbranch, dgate, dshift, dscale = results[case, seed, 1][11:]
        return [x_out, y, dx, dbranch, dshift, dscale, dgate]

    hold(held, case.definition, case.inputs, NAMES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_are_those_of_the_rounded_stream(results, case):
    x_out, _, mean, rstd = results[case, 0, 0][7:]
    x = x_out.double()
    # A sum of D terms in any order, two roundings of a term and two of the whole; the root halves an error.
    bound = (case.shape[2] + 4) * UNIT
    assert ((mean - x.mean(-1)).abs() <= bound * x.abs().mean(-1)).all()
    truth = (x.var(-1, correction=0) + EPS).rsqrt()
    assert ((rstd - truth).abs() <= bound * truth).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_written_behind_an_output(results, case):
    for output in (*results[case, 0, 0][7:], *results[case, 0, 1][11:]):
        assert output is None or behind(output).isnan().all()


@pytest.mark.parametrize(("stream", "gated"), TWO)
def test_a_stream_that_is_made_again_changes_no_bit(results, stream, gated):
    assert torch.equal(results[stream, gated, "again"][8], results[stream, gated, "second"][8])
    given, rebuilt = (results[stream, gated, name][11:] for name in ("given", "rebuilt"))
    for name, one, other in zip(("dx", "dbranch", "dgate", "dshift", "dscale"), given, rebuilt, strict=True):
        assert one.isfinite().all() and torch.equal(one, other), name


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Iterator[Any]:
    """``compiled(configuration)``: PTX of its first kernel for sm_90."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield lambda name: aot.compile_configuration(name, 90)[0][1].ptx


@pytest.mark.build
def test_y_alone_is_the_same_arithmetic(compiled):
    operations = [
        re.findall(r"\b(?:add|sub|mul|fma|rsqrt|cvt|shfl)\.[\w.]+", compiled(name))
        for name in ("residual_ada_layer_norm 1152", "residual_ada_layer_norm 1152 y alone")
    ]
    floats = [[one for one in found if "f32" in one or "shfl" in one] for found in operations]
    assert len(floats[0]) > 36 * 5 and floats[0] == floats[1]


@pytest.mark.build
def test_rows_move_in_whole_vectors(compiled):
    """A lane has 36 columns, four at a time: 16 bytes of float32, 8 of bfloat16; 8 at a time if all are of 16 bits."""
    ptx = compiled("residual_ada_layer_norm 1152")
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 9  # x
    assert len(re.findall(r"ld\.global\S*\.v2\.b32", ptx)) == 4 * 9  # branch, gate, scale, shift
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 9 and len(re.findall(r"st\.global\S*\.v2\.b32", ptx)) == 9
    assert "bar.sync" not in ptx and ".shared" not in ptx
    ptx = compiled("residual_ada_layer_norm bf16 1152")
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 5 * 4
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 2 * 4


@pytest.mark.build
def test_the_backward_pass_waits_for_no_row(compiled):
    """The next rows come by asynchronous copies: all that is loaded by itself is the gate and the scale, before."""
    ptx = compiled("residual_ada_layer_norm backward 1152")
    assert "cp.async" in ptx
    assert len(re.findall(r"ld\.global", ptx)) == 2 * 3
    assert not re.search(r"\b(atom|red)\.", ptx), "a float atomic has no fixed order"
