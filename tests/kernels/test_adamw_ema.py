"""kernels/adamw_ema.py in Triton's interpreter against the definition in float64, and as compiled."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops.adamw_ema import (
    COLUMNS,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Factor,
    Setting,
    StepState,
    advance_reference,
    update_reference,
)
from erd_fast.ops.tensor_table import CHUNK, MOST_EMAS, Slot
from support.parity import Tensors, hold
from support.triton_interpreter import UNIT, Call, around, interpret, within_memory

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
aot = pytest.importorskip("support.triton_aot")

OP = "adamw_ema"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALIGNED, MISALIGNED = 8, 1
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def _settings(**columns: list[float]) -> Tensor:
    """A row a group; what is not given is what is usual."""
    groups = len(next(iter(columns.values())))
    usual = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "ema_decay": 0.9999}
    table = torch.zeros((groups, COLUMNS), dtype=torch.float64)
    for name, values in ({name: [value] * groups for name, value in usual.items()} | columns).items():
        table[:, Setting[name.upper()]] = torch.tensor(values, dtype=torch.float64)
    for number in range(1, MOST_EMAS):
        table[:, Setting.EMA_DECAY + number] = 0.9 / number
    return table


@dataclass(frozen=True)
class Step:
    opt_step: int = 0
    growth: int = 0
    loss_scale: float = 1.0
    norm: float = 3.0
    growth_interval: int = 0

    def state(self, groups: int) -> StepState:
        counts = torch.tensor([self.opt_step, self.growth, 7])
        factors = within_memory(torch.full((groups * COLUMNS,), torch.nan), ALIGNED)
        return StepState(counts, torch.tensor([self.loss_scale, torch.nan]), factors.view(groups, COLUMNS))

    def call(self, settings: Tensor) -> Call:
        """Without any tensor to update."""
        nowhere = (torch.zeros((0, 12), dtype=torch.int64), torch.zeros((0, 2), dtype=torch.int32))
        how = (settings, torch.tensor(self.norm), self.growth_interval)
        return Call(OP, (*nowhere, CHUNK, *how, 0, *self.state(len(settings))))


GROUPS = _settings(
    lr=[1e-3, 1e-4, 2.0, 1e-3, 3e-4],
    beta1=[0.9, 0.0, 0.9, 0.95, 0.5],
    beta2=[0.999, 0.95, 0.0, 0.9999, 0.99],
    eps=[1e-8, 0.0, 1e-6, 1e-8, 1e-15],
    weight_decay=[0.0, 0.1, 0.01, 0.0, 0.05],
    grad_clip=[0.0, 1.0, 1e6, 0.5, 3.0],
    warmup=[0.0, 5.0, 0.0, 5.0, 5.0],
    cosine_steps=[0.0, 0.0, 100.0, 100.0, 1.1e6],
    start=[0.0, 0.0, 0.0, -4.0, -1.0],
    ema_decay=[0.0, 0.9999, 0.5, 0.999999, 0.3],
)
JOINED = _settings(start=[0.0, 1000.0], warmup=[10.0, 10.0], cosine_steps=[0.0, 50.0])  # the second one just now
MANY = _settings(lr=[1e-3 * number for number in range(75)])  # more than the program takes at a time
STEPS: dict[str, tuple[Step, Tensor]] = {
    **{
        f"opt_step {done}": (Step(done), GROUPS)
        for done in (0, 1, 4, 5, 6, 49, 50, 95, 96, 99, 100, 101, 999_999, 1_000_000)
    },
    **{f"norm {norm}": (Step(3, 5, 65536.0, norm), GROUPS) for norm in (*NOT_FINITE, 0.0, 1e-3)},
    "joined": (Step(1000), JOINED),
    "many groups": (Step(17), MANY),
}
# With a growth interval of 2000: step -> counts and loss scale afterwards.
SCALES: dict[Step, tuple[list[int], float]] = {
    Step(2, 1998, 1024.0, 1e3, 2000): ([3, 1999, 7], 1024.0),
    Step(2, 1999, 1024.0, 1e3, 2000): ([3, 0, 7], 2048.0),
    Step(2, 1999, LARGEST_SCALE, 1e3, 2000): ([3, 0, 7], LARGEST_SCALE),
    **{Step(2, 1999, 1024.0, norm, 2000): ([2, 0, 8], 512.0) for norm in NOT_FINITE},
    Step(2, 5, SMALLEST_SCALE, torch.inf, 2000): ([2, 0, 8], SMALLEST_SCALE),
    Step(2, 1999, 1024.0, 1e3, 0): ([3, 1999, 7], 1024.0),
    Step(2, 1999, 1024.0, torch.inf, 0): ([2, 1999, 8], 1024.0),
}

PAIRS = list(itertools.product(FLOATS, (None, *FLOATS)))  # dtypes of gradient and copy
SIZES = (1, 7, 8191, 8192, 8193, 0, 20000)
SMALL = (1, 512, 513, 0, 600, 1024, 1500)  # of a block and some
CHANGED = ("parameter", "exp_avg", "exp_avg_sq", "copy", *(f"ema {number}" for number in range(MOST_EMAS)))
THREE = _settings(
    lr=[1e-3, 1e-2, 0.1],
    beta1=[0.9, 0.0, 0.95],
    beta2=[0.999, 0.95, 0.5],
    eps=[1e-8, 1e-3, 1e-8],
    weight_decay=[0.0, 0.1, 0.5],
    grad_clip=[0.0, 1.0, 0.1],
    warmup=[0.0, 1e3, 0.0],
    cosine_steps=[0.0, 0.0, 1e3],
)
BEFORE = Step(100, 3, 1024.0)


@dataclass(frozen=True)
class Case:
    """Tensors of all sizes, which take dtypes and groups in turn."""

    decays: int
    offset: int
    sizes: tuple[int, ...] = SMALL
    value: float | None = None  # of the first gradient's last element

    def __str__(self) -> str:
        place = "aligned" if self.offset == ALIGNED else "misaligned"
        return f"{self.decays} averages {place}" + (f" {self.value}" if self.value is not None else "")

    def inputs(self, seed: int) -> list[Tensor | None]:
        """The norm, and of each slot the gradient and what is CHANGED."""
        generator = torch.Generator().manual_seed(seed)
        given: list[Tensor | None] = []
        for number, size in enumerate(self.sizes):
            # Five further with each decay, all pairs come to tensors of whole blocks.
            dtype, copied = PAIRS[(5 * self.decays + number) % len(PAIRS)]
            normals = torch.randn((4 + self.decays, size), generator=generator)
            gradient, parameter = (10 * normals[0]).to(dtype), normals[1]
            if self.value is not None and number == 0:
                gradient[-1] = self.value
            given += [gradient, parameter, 0.01 * normals[2], 1e-4 * normals[3].square()]
            given += [None if copied is None else torch.zeros(size, dtype=copied)]
            given += [*(parameter + 0.01 * noise for noise in normals[4:]), *[None] * (MOST_EMAS - self.decays)]
        gradients = [value.double() for value in given[:: 1 + len(CHANGED)] if value is not None]
        return [torch.cat(gradients).norm().float(), *given]

    def call(self, seed: int) -> Call:
        norm, *given = self.inputs(seed)
        placed = [None if value is None else within_memory(value, self.offset) for value in given]
        return Call(OP, (CHUNK, THREE, norm, 2000, self.decays, *BEFORE.state(len(THREE))), slots=_slots(placed))

    @staticmethod
    def definition(norm: Tensor, *given: Tensor | None) -> Tensors:
        """CHANGED of each slot, in the dtype of the norm."""
        counts, scalars, factors = BEFORE.state(len(THREE))
        state = StepState(counts, scalars.to(norm.dtype), factors.to(norm.dtype))
        advance_reference(THREE, norm, 2000, state)
        slots = _slots([None if value is None else value.clone() for value in given])
        for slot in slots:
            update_reference(slot, state.factors[slot.group].tolist())
        return _changed(slots)


def _slots(given: list[Any]) -> tuple[Slot, ...]:
    width = 1 + len(CHANGED)
    rows = [given[first : first + width] for first in range(0, len(given), width)]
    return tuple(
        Slot(*row[:5], emas=tuple(ema for ema in row[5:] if ema is not None), group=number % len(THREE))
        for number, row in enumerate(rows)
    )


def _changed(slots: tuple[Slot, ...]) -> list[Tensor | None]:
    """None for what a slot has not, or has without elements."""
    found: list[Tensor | None] = []
    for slot in slots:
        own = (slot.parameter, slot.exp_avg, slot.exp_avg_sq, slot.copy, *slot.emas)
        own += (None,) * (len(CHANGED) - len(own))
        found += [value if value is not None and value.numel() else None for value in own]
    return found


CASES = [
    Case(decays, offset, SIZES if decays == 1 else SMALL)
    for decays in range(MOST_EMAS + 1)
    for offset in (ALIGNED, MISALIGNED)
]
SKIPPED = [
    Case(decays, offset, (700, 7), value)
    for decays, offset in ((0, ALIGNED), (2, MISALIGNED))
    for value in NOT_FINITE
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Any, tuple[Any, ...]]:
    calls: dict[Any, Call] = {case: case.call(0) for case in (*CASES, *SKIPPED)}
    calls |= {name: step.call(settings) for name, (step, settings) in STEPS.items()}
    calls |= {step: step.call(THREE) for step in SCALES}
    return dict(zip(calls, interpret(list(calls.values()), tmp_path_factory.mktemp(OP)), strict=True))


def _state(arguments: tuple[Any, ...]) -> StepState:
    return StepState(*[value for value in arguments if isinstance(value, Tensor)][-3:])


def _updated(arguments: tuple[Any, ...]) -> tuple[Slot, ...]:
    return tuple(value for value in arguments if isinstance(value, Slot))


@pytest.mark.parametrize("name", STEPS)
def test_the_numbers_of_a_step_are_those_of_the_definition(results, name):
    step, settings = STEPS[name]
    counts, scalars, factors = step.state(len(settings))
    truth = StepState(counts, scalars.double(), factors.double())
    advance_reference(settings, torch.tensor(step.norm), step.growth_interval, truth)
    found = _state(results[name])
    assert torch.equal(found.counts, truth.counts)
    # One rounding of what is known to 1e-12 in float64, where bias corrections and the end of the cosine cancel.
    for one, other in ((found.scalars, truth.scalars), (found.factors, truth.factors)):
        torch.testing.assert_close(one.double(), other, rtol=1.001 * UNIT, atol=0.0, equal_nan=True)
    assert around(found.factors).isnan().all()


@pytest.mark.parametrize("step", SCALES, ids=str)
def test_the_loss_scale_grows_and_falls(results, step):
    counts, scalars, factors = _state(results[step])
    assert (counts.tolist(), scalars[0].item()) == SCALES[step]
    # The step itself, if it is taken, is taken by the scale that its gradients have.
    assert factors[:, Factor.APPLY].tolist() == [counts[0] - step.opt_step] * len(factors)
    assert not factors[0, Factor.APPLY] or factors[0, Factor.GRADIENT] == 1 / step.loss_scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_update_is_that_of_the_definition(results, case):
    names = [f"{name} of {size}" for size in case.sizes for name in CHANGED]
    hold(lambda *given: _changed(_updated(results[case])), case.definition, case.inputs, names, seeds=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_else_is_written(results, case):
    found, given = _updated(results[case]), case.call(0).slots
    assert all(torch.equal(one.gradient, other.gradient) for one, other in zip(found, given, strict=True))
    for slot in found:
        for tensor in (slot.gradient, slot.parameter, slot.exp_avg, slot.exp_avg_sq, slot.copy, *slot.emas):
            assert tensor is None or around(tensor).isnan().all()


@pytest.mark.parametrize("case", SKIPPED, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counts(results, case):
    for one, other in zip(_changed(_updated(results[case])), _changed(case.call(0).slots), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    state = _state(results[case])
    assert state.counts.tolist() == [100, 0, 8] and state.scalars[0] == 512


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[str]:
    """PTX of both kernels for sm_90, with one average."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return [used.ptx for _, used in aot.compile_configuration("adamw_ema 1 average", 90)]


@pytest.mark.build
def test_whole_blocks_move_in_vectors_of_four_elements(compiled):
    """16 bytes of float32 and 8 of the 16-bit types; the gradient and the copy have a branch for each dtype."""
    loads, stores = (re.findall(rf"{access}\.global\S*\.(v\d\.b\d+)", compiled[1]) for access in ("ld", "st"))
    assert sorted(loads) == ["v2.b32"] * 2 + ["v4.b32"] * (4 + 1)
    assert sorted(stores) == ["v2.b32"] * 2 + ["v4.b32"] * (4 + 1)
    assert ".shared" not in compiled[1], "loads and stores of a block have one layout"


@pytest.mark.build
def test_a_block_is_on_its_way_before_it_is_waited_for(compiled):
    before = re.split(r"\b(?:add|sub|mul|fma)\S*\.f32", compiled[1])[0]
    assert len(re.findall(r"ld\.global\S*\.v\d", before)) == 4 + 3
