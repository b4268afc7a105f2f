"""adamw_ema in C++ and CUDA: the numbers of a step against their definition, elements equal bit for bit to its formula
with every product and sum rounded, and that by the rule of parity."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops import use_backend
from erd_fast.ops.adamw_ema import (
    COLUMNS,
    LARGEST_SCALE,
    Factor,
    Setting,
    StepState,
    adamw_ema,
    advance_reference,
)
from erd_fast.ops.tensor_table import CHUNK, MOST_EMAS, Slot, TensorTable
from support.parity import hold

pytestmark = pytest.mark.build

HALF_ULP = 2.0**-24
SIZES = (1, 7, 0, 8191, 8192, 8193, 20000)
GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (None, torch.bfloat16, torch.float16, torch.float32)
GROUPS: tuple[dict[Setting, float], ...] = (
    {Setting.LR: 1e-2, Setting.WEIGHT_DECAY: 0.1, Setting.GRAD_CLIP: 1.0, Setting.WARMUP: 5, Setting.COSINE_STEPS: 100},
    {Setting.LR: 1e-3, Setting.BETA1: 0.8, Setting.BETA2: 0.99, Setting.EPS: 1e-3, Setting.START: 2},
    {Setting.LR: 1.0, Setting.BETA1: 0.0, Setting.COSINE_STEPS: 50, Setting.GRAD_CLIP: 1e9},
)
DECAYS = (0.9999, 0.5, 0.0, 0.99)


def _settings(groups: Sequence[dict[Setting, float]] = GROUPS) -> Tensor:
    settings = torch.zeros(len(groups), COLUMNS, dtype=torch.float64)
    usual = {Setting.LR: 1e-3, Setting.BETA1: 0.9, Setting.BETA2: 0.999, Setting.EPS: 1e-8}
    usual |= {Setting.EMA_DECAY + number: decay for number, decay in enumerate(DECAYS)}
    for row, group in zip(settings, groups, strict=True):
        for column, value in {**usual, **group}.items():
            row[column] = value
    return settings


def _state(groups: int, counts: Sequence[int] = (3, 1, 0), scale: float = 4.0, dtype: torch.dtype = torch.float32):
    factors = torch.full((groups, COLUMNS), torch.nan, dtype=dtype)
    return StepState(torch.tensor(counts), torch.tensor([scale, torch.nan], dtype=dtype), factors)


class Memory:
    """Tensors as views of one buffer for each dtype, between numbers that nobody may change."""

    def __init__(self, shift: int):
        self._shift = shift
        self._views: list[Tensor] = []
        self._buffers = {dtype: torch.full((1 << 19,), 7.0, dtype=dtype) for dtype in GRADIENTS}
        self._ends = dict.fromkeys(GRADIENTS, 0)

    def put(self, values: Tensor) -> Tensor:
        """``values`` at ``shift`` elements from a multiple of 16 bytes, two elements at least after the last ones."""
        start = -(-(self._ends[values.dtype] + 2) // 8) * 8 + self._shift
        self._ends[values.dtype] = start + values.numel()
        self._views.append(self._buffers[values.dtype][start : self._ends[values.dtype]].copy_(values))
        return self._views[-1]

    def rest(self) -> list[Tensor]:
        """All that is in no view; the views are lost."""
        for view in self._views:
            view.fill_(7.0)
        return list(self._buffers.values())


def _slots(decays: int, shift: int = 0, groups: int = len(GROUPS)) -> tuple[list[Slot], Memory]:
    """A slot of each size, with gradients and copies in turn of each dtype."""
    generator = torch.Generator().manual_seed(decays)
    memory = Memory(shift)
    slots = []
    for number, size in enumerate(SIZES):
        kind, copied = GRADIENTS[number % len(GRADIENTS)], COPIES[number % len(COPIES)]
        values = torch.randn(4 + decays, size, generator=generator)
        values[0, size // 2 :] = 0  # a row of an embedding that no image asked for
        values[3] = values[3].square()
        gradient, parameter, exp_avg, exp_avg_sq, *emas = values
        slots.append(
            Slot(
                memory.put(gradient.to(kind)),
                memory.put(parameter),
                memory.put(exp_avg),
                memory.put(exp_avg_sq),
                None if copied is None else memory.put(torch.full((size,), torch.nan, dtype=copied)),
                tuple(memory.put(ema) for ema in emas),
                number % groups,
            )
        )
    return slots, memory


def _kept(slots: Sequence[Slot]) -> list[Tensor]:
    """All that a step may change."""
    tensors = [(s.parameter, s.exp_avg, s.exp_avg_sq, s.copy, *s.emas) for s in slots]
    return [tensor for row in tensors for tensor in row if tensor is not None]


def _clones(slots: Sequence[Slot]) -> list[Slot]:
    return [
        Slot(
            slot.gradient.clone(),
            *(None if tensor is None else tensor.clone() for tensor in slot[1:5]),
            tuple(ema.clone() for ema in slot.emas),
            slot.group,
        )
        for slot in slots
    ]


def _run(ops: Any, slots: Sequence[Slot], settings: Tensor, norm: Tensor, state: StepState, growth: int = 0) -> None:
    table = TensorTable(torch.device("cpu"))
    table.update(slots)
    decays = max((len(slot.emas) for slot in slots), default=0)
    ops.adamw_ema_fwd(table.rows, table.places, CHUNK, settings, norm, growth, decays, *state)


def _rounded(slot: Slot, factors: Sequence[float]) -> None:
    """The formula of update_reference with every product and sum rounded; PyTorch itself may take them as one."""
    p, m, v = slot.parameter, slot.exp_avg, slot.exp_avg_sq
    assert p is not None and m is not None and v is not None
    g = slot.gradient.float() * factors[Factor.GRADIENT]
    m += (g - m) * factors[Factor.NEW1]
    v *= factors[Factor.OLD2]
    v += g * g * factors[Factor.NEW2]
    p *= factors[Factor.KEEP]
    root = v.double().sqrt().float()  # PyTorch's own is not always the nearest
    p -= m / (root * factors[Factor.ROOT] + factors[Factor.EPS]) * factors[Factor.STEP]
    for number, ema in enumerate(slot.emas):
        ema += (p - ema) * factors[Factor.EMA + number]
    if slot.copy is not None:
        slot.copy.copy_(p)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("decays", range(MOST_EMAS + 1))
def test_elements_are_equal_to_the_rounded_formula(ops, decays, shift):
    slots, memory = _slots(decays, shift)
    expected, gradients = _clones(slots), [slot.gradient.clone() for slot in slots]
    state = _state(len(GROUPS))
    for norm in (300.0, 0.7):  # clipped by one group, and by none
        _run(ops, slots, _settings(), torch.tensor(norm), state)
        for slot in expected:
            _rounded(slot, state.factors[slot.group].tolist())
    for number, (one, other) in enumerate(zip(_kept(slots), _kept(expected), strict=True)):
        assert torch.equal(one, other), number
    assert all(torch.equal(slot.gradient, before) for slot, before in zip(slots, gradients, strict=True))
    assert all((buffer == 7.0).all() for buffer in memory.rest())


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("copied", COPIES, ids=str)
@pytest.mark.parametrize("kind", GRADIENTS, ids=str)
def test_every_pair_of_formats(ops, kind, copied, shift):
    memory = Memory(shift)
    values = torch.randn(5, 1027, generator=torch.Generator().manual_seed(1))
    gradient, *kept = values
    copy = None if copied is None else memory.put(torch.empty(1027, dtype=copied))
    parameter, exp_avg, exp_avg_sq, ema = (memory.put(value.abs()) for value in kept)
    slots = [Slot(memory.put(gradient.to(kind)), parameter, exp_avg, exp_avg_sq, copy, (ema,), 0)]
    expected, state = _clones(slots), _state(1)
    _run(ops, slots, _settings(GROUPS[:1]), torch.tensor(30.0), state)
    _rounded(expected[0], state.factors[0].tolist())
    assert all(torch.equal(one, other) for one, other in zip(_kept(slots), _kept(expected), strict=True))
    assert all((buffer == 7.0).all() for buffer in memory.rest())


def _situations() -> Iterator[tuple[tuple[int, int, int], float, float, int]]:
    """counts, loss scale, norm, growth interval"""
    for taken in (0, 1, 2, 4, 5, 6, 48, 49, 50, 98, 99, 100, 3000, 10**7):
        yield (taken, 0, 0), 1.0, 2.5, 0
    for norm, scale, growth in itertools.product(
        (0.0, 3e-6, 5.0, 3e38, torch.inf, torch.nan), (1.0, 0.5, 65536.0, LARGEST_SCALE), (0, 1, 2, 3)
    ):
        yield (7, 1, 2), scale, norm, growth


def test_the_numbers_of_a_step_are_those_of_the_definition(ops):
    settings = _settings()
    settings[:, Setting.START] = 0
    for counts, scale, norm, growth in _situations():
        state, exact = _state(3, counts, scale), _state(3, counts, scale, torch.float64)
        _run(ops, [], settings, torch.tensor(norm), state, growth)
        advance_reference(settings, torch.tensor(norm), growth, exact)
        assert torch.equal(state.counts, exact.counts)
        # A loss scale is a power of two; the norm is rounded once.
        assert torch.equal(state.scalars.nan_to_num(-1.0), exact.scalars.float().nan_to_num(-1.0))
        assert state.factors[:, Factor.LR + 1 :].isnan().all()
        if not norm < torch.inf:
            assert (state.factors[:, Factor.APPLY] == 0).all()
            continue
        # One rounding to float32. In float64: of a power of beta two units in the last place, which 1 - beta^n makes
        # 1 / (1 - beta) <= 1000 times as large; of a cosine and what is in it four, relative to the rate's maximum.
        found, truth = state.factors[:, : Factor.LR + 1].double(), exact.factors[:, : Factor.LR + 1]
        bound = (HALF_ULP + 2000 * 2.0**-52) * truth.abs() + 4 * 2.0**-52
        assert ((found - truth).abs() <= bound).all(), (counts, scale, norm)


def test_a_group_that_joins_later_begins_its_own_count(ops):
    state, alone = _state(2, (12, 0, 0)), _state(1, (2, 0, 0))
    late = {Setting.LR: 1e-2, Setting.WARMUP: 9}
    _run(ops, [], _settings([late, {**late, Setting.START: 10}]), torch.tensor(1.0), state)
    _run(ops, [], _settings([late]), torch.tensor(1.0), alone)
    assert torch.equal(state.factors[1].nan_to_num(), alone.factors[0].nan_to_num())
    assert not torch.equal(state.factors[0].nan_to_num(), alone.factors[0].nan_to_num())


def test_all_groups_see_the_numbers_before_the_step(ops):
    # More groups than threads of the block that works them out.
    settings, state = _settings([GROUPS[0]] * 100), _state(100, (4, 3, 0), 8.0)
    _run(ops, [], settings, torch.tensor(16.0), state, 4)
    assert torch.equal(state.factors.nan_to_num(), state.factors[:1].nan_to_num().expand(100, -1))
    assert state.factors[0, Factor.GRADIENT] == torch.tensor(1 / 2.000001 / 8)
    assert state.counts.tolist() == [5, 0, 0] and state.scalars.tolist() == [16.0, 2.0]


def test_the_loss_scale_grows_and_backs_off(ops):
    inf, nan = torch.inf, torch.nan
    state, scales, counts = _state(1, (0, 0, 0), 4.0), [], []
    for norm in (1.0, 1.0, inf, 1.0, nan, 1.0, 1.0, inf, inf, inf, inf, inf, 1.0):
        _run(ops, [], _settings(GROUPS[:1]), torch.tensor(norm), state, 2)
        scales.append(state.scalars[0].item())
        counts.append(state.counts.tolist())
    assert scales == [4.0, 8.0, 4.0, 4.0, 2.0, 2.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert counts[5] == [4, 1, 2] and counts[-1] == [6, 1, 7]
    largest = _state(1, (5, 1, 0), LARGEST_SCALE)
    _run(ops, [], _settings(GROUPS[:1]), torch.tensor(1.0), largest, 2)
    assert largest.scalars[0] == LARGEST_SCALE and largest.counts.tolist() == [6, 0, 0]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(ops, value, shift):
    slots, memory = _slots(1, shift)
    slots[-1].gradient[8192] = value
    before, state = [tensor.clone() for tensor in _kept(slots)], _state(len(GROUPS), scale=8.0)
    table = TensorTable(torch.device("cpu"))
    table.update(slots)
    norm, partials = torch.empty(()), torch.empty(len(table.places))
    ops.grad_norm_fwd(table.rows, table.places, CHUNK, norm, partials)
    _run(ops, slots, _settings(), norm, state, 100)
    assert all(torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(_kept(slots), before, strict=True))
    assert state.counts.tolist() == [3, 0, 1]
    assert state.scalars[0] == 4.0 and not state.scalars[1].isfinite()
    assert all((buffer == 7.0).all() for buffer in memory.rest())


def test_what_a_slot_does_not_have_is_left_out(ops):
    slots, _ = _slots(decays=3)
    slots = [slot._replace(emas=slot.emas[: number % 4], copy=None) for number, slot in enumerate(slots)]
    expected, state = _clones(slots), _state(len(GROUPS))
    _run(ops, slots, _settings(), torch.tensor(1.0), state)
    for slot in expected:
        _rounded(slot, state.factors[slot.group].tolist())
    assert all(torch.equal(one, other) for one, other in zip(_kept(slots), _kept(expected), strict=True))


def test_averages_beyond_the_decays_are_left_alone(ops):
    slots, _ = _slots(decays=4)
    table = TensorTable(torch.device("cpu"))
    table.update(slots)
    before = [[ema.clone() for ema in slot.emas] for slot in slots]
    ops.adamw_ema_fwd(
        table.rows, table.places, CHUNK, _settings(), torch.tensor(1.0), 0, 2, *_state(len(GROUPS))
    )  # fmt: skip
    for slot, kept in zip(slots, before, strict=True):
        changed = [not torch.equal(one, other) for one, other in zip(slot.emas, kept, strict=True)]
        assert changed == [slot.gradient.numel() > 0] * 2 + [False] * 2


def _inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradient, parameter, exp_avg, ema = torch.randn(4, 20000, generator=generator)
    exp_avg_sq = torch.rand(20000, generator=generator)
    return [3.0 * gradient, parameter, exp_avg, exp_avg_sq, ema, torch.empty(20000, dtype=torch.bfloat16)]


def _two_steps(step: Any, gradient: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    """Of group 0, in the dtype of the parameter."""
    parameter, exp_avg, exp_avg_sq, ema, copy = (tensor.clone() for tensor in kept)
    slot = Slot(gradient, parameter, exp_avg, exp_avg_sq, copy, (ema,), 0)
    state = _state(1, dtype=parameter.dtype)
    for norm in (300.0, 0.7):
        step([slot], _settings(GROUPS[:1]), torch.tensor(norm, dtype=parameter.dtype), state)
    return parameter, exp_avg, exp_avg_sq, ema, copy


def test_steps_err_no_more_than_the_definition_in_float32(ops):
    def reference(slots: list[Slot], settings: Tensor, norm: Tensor, state: StepState) -> None:
        table = TensorTable(torch.device("cpu"))
        table.update(slots)
        with use_backend("reference"):
            adamw_ema(slots, table, settings, norm, state)

    hold(
        lambda *given: _two_steps(lambda *args: _run(ops, *args), *given),
        lambda *given: _two_steps(reference, *given),
        _inputs,
        ("parameter", "exp_avg", "exp_avg_sq", "ema", "copy"),
    )


def test_the_public_op_runs_it(cpu_ops):
    slots, _ = _slots(1)
    own, state = _clones(slots), _state(len(GROUPS))
    table, settings, other = TensorTable(torch.device("cpu")), _settings(), _state(len(GROUPS))
    table.update(slots)
    with use_backend(adamw_ema="cpu"):
        adamw_ema(slots, table, settings, torch.tensor(2.0), state, growth_interval=5)
    _run(cpu_ops, own, settings, torch.tensor(2.0), other, 5)
    assert torch.equal(state.counts, other.counts) and torch.equal(state.scalars, other.scalars)
    assert all(torch.equal(one, two) for one, two in zip(_kept(slots), _kept(own), strict=True))


def test_threads_change_nothing(cpu_ops):
    threads, results = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        slots, _ = _slots(2)
        _run(cpu_ops, slots, _settings(), torch.tensor(1.0), _state(len(GROUPS)))
        results.append(_kept(slots))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bad_arguments_are_named(cpu_ops):
    slots, _ = _slots(1)
    table, state = TensorTable(torch.device("cpu")), _state(len(GROUPS))
    table.update(slots)
    good = {
        "rows": table.rows,
        "places": table.places,
        "chunk": CHUNK,
        "settings": _settings(),
        "norm": torch.tensor(1.0),
        "growth_interval": 0,
        "decays": 1,
        **state._asdict(),
    }
    for changed, message in (
        ({"rows": table.rows.int()}, "rows must be Long, got Int"),
        ({"places": table.places.long()}, "places must be Int, got Long"),
        ({"chunk": 1024}, "chunk must be 8192, got 1024"),
        ({"settings": _settings().float()}, "settings must be Double, got Float"),
        ({"settings": _settings()[:, :15].contiguous()}, "settings must have 32 elements, got 45"),
        ({"settings": _settings()[:2]}, r"group must be in \[0, 2\), got 2"),
        ({"norm": torch.ones(2)}, "norm must have 1 elements, got 2"),
        ({"norm": torch.tensor(1.0).double()}, "norm must be Float, got Double"),
        ({"counts": state.counts.int()}, "counts must be Long, got Int"),
        ({"counts": state.counts[:2]}, "counts must have 3 elements, got 2"),
        ({"scalars": state.scalars.double()}, "scalars must be Float, got Double"),
        ({"factors": state.factors.double()}, "factors must be Float, got Double"),
        ({"factors": state.factors[:2]}, "factors must have 48 elements, got 32"),
        ({"factors": state.factors.T.contiguous().T}, "factors must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"adamw_ema: {message}"):
            cpu_ops.adamw_ema_fwd(**good | changed)
    assert state.counts.tolist() == [3, 1, 0]
