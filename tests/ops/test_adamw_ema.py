"""adamw_ema: what a step is by its definition, and that every backend that is here takes it."""

import dataclasses
import math

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from erd_fast.errors import BackendUnavailableError
from erd_fast.ops import OPS, adamw_ema, grad_norm, use_backend
from erd_fast.ops.adamw_ema import COLUMNS, Factor, Setting, StepState, advance_reference
from erd_fast.ops.tensor_table import CHUNK, Slot, Slots, TensorTable

CPU = torch.device("cpu")
SIZES = (1, 7, CHUNK - 1, CHUNK + 1)
BACKENDS = [name for name in OPS["adamw_ema"].backends if OPS["adamw_ema"].why_not(name) is None]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def setting(**values: float) -> list[float]:
    given = {"LR": 1e-2, "BETA1": 0.9, "BETA2": 0.95, "EPS": 1e-8, "EMA_DECAY": 0.99, **values}
    return [float(given.get(Setting(column).name, 0.0)) if column <= Setting.EMA_DECAY else 0.0 for column in range(16)]


@dataclasses.dataclass
class Problem:
    """Parameters with gradients; ``step`` takes one."""

    slots: list[Slot]
    settings: torch.Tensor
    state: StepState
    growth_interval: int = 0

    def step(self) -> None:
        table = TensorTable(self.settings.device)
        table.update(self.slots)
        norm = grad_norm([slot.gradient for slot in self.slots], table)
        adamw_ema(self.slots, table, self.settings, norm, self.state, growth_interval=self.growth_interval)

    def tensors(self) -> list[torch.Tensor]:
        own = [t for s in self.slots for t in (s.parameter, s.exp_avg, s.exp_avg_sq, s.copy, *s.emas) if t is not None]
        return [tensor.clone() for tensor in own]


def problem(
    dtype: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.float32,
    copy: torch.dtype | None = None,
    emas: int = 1,
    rows: int = 2,
    scale: float = 1.0,
    misaligned: bool = False,
    growth_interval: int = 0,
    **values: float,
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:] if misaligned else None
        return tensor.to(DEVICE) if room is None else room.copy_(tensor)

    slots = []
    for number, size in enumerate(SIZES):
        drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3 + emas)]
        slots.append(
            Slot(
                place((drawn[0] * scale).to(gradient)),
                place(drawn[1].to(dtype)),
                place(0.1 * drawn[2].to(dtype)),
                place(0.01 * drawn[2].to(dtype).square()),
                None if copy is None else place(torch.zeros(size, dtype=copy)),
                tuple(place(value.to(dtype)) for value in drawn[3:]),
                number % rows,
            )
        )
    both = [setting(**values), setting(**{**values, "LR": 3e-3, "WEIGHT_DECAY": 0.1})]
    table = torch.tensor(both[:rows], dtype=torch.float64)
    wide = torch.float64 if torch.float64 in (dtype, gradient) else torch.float32
    state = StepState(
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
        torch.tensor([scale, 0.0], dtype=wide, device=DEVICE),
        torch.zeros(rows, COLUMNS, dtype=wide, device=DEVICE),
    )
    return Problem(slots, table.to(DEVICE), state, growth_interval)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize(
    ("gradient", "copy", "emas"),
    [
        (torch.float32, None, 1),
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.float16, torch.float16, 2),
        (torch.float32, torch.bfloat16, 4),
        (torch.float32, None, 0),
    ],
)
def test_every_backend_takes_the_step_of_the_definition(backend, gradient, copy, emas, misaligned):
    how = {"gradient": gradient, "copy": copy, "emas": emas, "GRAD_CLIP": 1.0, "WARMUP": 3, "scale": 8.0}
    ours, truth = problem(**how, misaligned=misaligned), problem(torch.float64, **how)
    with use_backend(adamw_ema=backend, grad_norm=backend):
        for _ in range(3):
            ours.step()
    with use_backend(adamw_ema="reference", grad_norm="reference"):
        for _ in range(3):
            truth.step()
    assert ours.state.counts.tolist() == truth.state.counts.tolist() == [3, 0, 0]
    assert float(ours.state.scalars[1]) == pytest.approx(float(truth.state.scalars[1]), rel=2e-6)
    # Three steps of some fifteen roundings each of numbers below 8; those of a copy are of its dtype.
    for found, exact in zip(ours.tensors(), truth.tensors(), strict=True):
        bound = 3 * 15 * 2**-24 * float(exact.double().abs().max()) + torch.finfo(found.dtype).eps / 2 * (
            float(exact.double().abs().max()) if found.dtype != torch.float32 else 0.0
        )
        assert float((found.double() - exact.double()).abs().max()) <= bound
    for slot in ours.slots:
        if slot.copy is not None:
            assert torch.equal(slot.copy, slot.parameter.to(copy))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_skipped_changes_counters_alone(backend, bad):
    made = problem(copy=torch.bfloat16, growth_interval=2, scale=4.0)
    with use_backend(adamw_ema=backend, grad_norm=backend):
        made.step()
        before = made.tensors()
        made.slots[2].gradient[-1] = bad
        made.step()
    assert all(torch.equal(a, b) for a, b in zip(before, made.tensors(), strict=True))
    assert made.state.counts.tolist() == [1, 0, 1]
    assert made.state.scalars[0] == 2.0 and not made.state.scalars[1].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_scale_grows_after_steps_without_overflow_and_has_limits(backend):
    made, scales = problem(growth_interval=2), []
    with use_backend(adamw_ema=backend, grad_norm=backend):
        for bad in (False, False, False, True, False, False, True, True, True, True):
            made.slots[0].gradient.fill_(math.nan if bad else 1.0)
            made.step()
            scales.append(float(made.state.scalars[0]))
        assert scales == [1, 2, 2, 1, 1, 2, 1, 1, 1, 1]
        made.state.scalars[0] = 2.0**32
        made.slots[0].gradient.fill_(0.0)
        for slot in made.slots:
            slot.gradient.zero_()
        for _ in range(3):
            made.step()
    assert made.state.scalars[0] == 2.0**32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_of_a_million_steps_has_finite_factors(backend):
    made = problem(BETA1=0.0, COSINE_STEPS=2_000_000)
    made.state.counts[0] = 1_000_000
    with use_backend(adamw_ema=backend, grad_norm=backend):
        made.step()
    row = made.state.factors[0]
    assert row[Factor.NEW1] == 1 and row[Factor.ROOT] == 1 and float(row[Factor.LR]) == pytest.approx(5e-3, rel=1e-6)
    assert float(row[Factor.STEP]) == pytest.approx(5e-3, rel=1e-6)
    assert float(row[Factor.EMA]) == pytest.approx(0.01, rel=1e-6)


def _factors(step: int, **values: float) -> torch.Tensor:
    state = StepState(torch.tensor([step - 1, 0, 0]), torch.tensor([1.0, 0.0]).double(), torch.zeros(1, 16).double())
    advance_reference(torch.tensor([setting(**values)], dtype=torch.float64), torch.tensor(2.0).double(), 0, state)
    return state.factors[0]


def test_the_rate_warms_up_and_follows_half_a_cosine():
    def rates(steps: range | tuple[int, ...], **values: float) -> list[float]:
        return [float(_factors(step, LR=2.0, **values)[Factor.LR]) for step in steps]

    assert rates((1, 2, 4, 5, 10), WARMUP=4) == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = rates((4, 5, 7, 9, 13, 21), WARMUP=4, COSINE_STEPS=12)
    assert cosine == pytest.approx([2.0, 2.0, 1.0 + math.sqrt(0.5), 1.0, 0.0, 0.0])
    assert rates((8, 9), WARMUP=4, START=4) == [2.0, 2.0] and rates((5,), WARMUP=4, START=4) == [0.5]


def test_factors_are_those_of_adamw():
    row = _factors(3, LR=0.5, WEIGHT_DECAY=0.1, GRAD_CLIP=1.0)
    expected = {
        Factor.GRADIENT: 1.0 / (2.0 + 1e-6),
        Factor.KEEP: 0.95,
        Factor.NEW1: 0.1,
        Factor.OLD2: 0.95,
        Factor.NEW2: 0.05,
        Factor.ROOT: 1 / math.sqrt(1 - 0.95**3),
        Factor.STEP: 0.5 / (1 - 0.9**3),
        Factor.EMA: 1 - 3 / 12,
    }
    for column, value in expected.items():
        assert float(row[column]) == pytest.approx(value, rel=1e-12), column
    assert _factors(3, GRAD_CLIP=2.5)[Factor.GRADIENT] == 1 and _factors(3)[Factor.GRADIENT] == 1


def test_averages_that_do_not_fit_are_refused():
    made = problem()
    made.slots[1] = made.slots[1]._replace(emas=())
    with pytest.raises(
        ValueError, match=r"adamw_ema: slots: given \[0, 1\] averages, allowed 0 to 4, as many for each"
    ):
        made.step()


def test_compiled_backends_take_float32():
    made = problem(torch.float64, torch.float64)
    with use_backend(adamw_ema="cpu"), pytest.raises(BackendUnavailableError, match="are not all float32"):
        made.step()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"parameter": s.parameter[:1]}, r"slots\[1\].parameter must have shape \(7,\), strides"),
        (lambda s: {"exp_avg": torch.zeros(14)[::2]}, r"slots\[1\].exp_avg: given strides \(2,\)"),
        (
            lambda s: {"exp_avg_sq": s.exp_avg_sq.bfloat16()},
            r"slots\[1\].exp_avg_sq must be torch.float32, got torch.bf",
        ),
        (lambda s: {"emas": (s.emas[0].double(),)}, r"slots\[1\].emas\[0\] must be torch.float32, got torch.float64"),
        (lambda s: {"copy": torch.zeros(7, 1).bfloat16()}, r"slots\[1\].copy must have shape"),
        (
            lambda s: {"copy": torch.zeros(7).long()},
            r"slots\[1\].copy must be one of torch.float32, .*, got torch.int64",
        ),
        (lambda s: {"gradient": s.gradient > 0}, r"slots\[1\].gradient must be floating point, got torch.bool"),
        (lambda s: {"gradient": torch._neg_view(s.gradient)}, r"slots\[1\].gradient must be a tensor without the neg"),
        (
            lambda s: {"exp_avg": torch._neg_view(s.exp_avg)},
            r"slots\[1\].exp_avg must be a tensor without the negative",
        ),
        (
            lambda s: {"gradient": s.gradient.to_sparse()},
            r"slots\[1\].gradient must be a plain dense tensor, got torch.sp",
        ),
        (
            lambda s: {"parameter": TwoTensor(s.parameter, s.parameter)},
            r"slots\[1\].parameter must be a plain dense tensor, got TwoTensor",
        ),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(spoil, message):
    """A kernel takes the size and the order of the gradient for all of them, and would write beyond the shorter one."""
    made = problem()
    made.slots[1] = made.slots[1]._replace(**spoil(made.slots[1]))
    with pytest.raises(ValueError, match=f"adamw_ema: {message}"):
        made.step()


@pytest.mark.parametrize("name", ["parameter", "exp_avg", "exp_avg_sq"])
def test_slots_without_parameter_or_moments_are_refused(name):
    made = problem()
    made.slots[1] = made.slots[1]._replace(**{name: None})
    with pytest.raises(ValueError, match=rf"adamw_ema: slots\[1\].{name} must be a tensor, got None"):
        made.step()


def test_a_table_of_the_same_memory_in_another_order_is_refused():
    made, table = problem(), TensorTable(DEVICE)
    slot = made.slots[1]._replace(gradient=torch.ones(2, 3, device=DEVICE))
    slot = slot._replace(**{name: torch.zeros(2, 3, device=DEVICE) for name in ("parameter", "exp_avg", "exp_avg_sq")})
    slot = slot._replace(emas=())
    table.update([slot])
    turned = slot._replace(gradient=slot.gradient.view(3, 2).t())
    with pytest.raises(ValueError, match="adamw_ema: table must be that of these tensors, got one with other gradient"):
        adamw_ema([turned], table, made.settings, torch.tensor(1.0, device=DEVICE), made.state)
    assert not slot.parameter.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_of_what_a_step_changes_are_incremented(backend):
    made = problem(copy=torch.bfloat16, emas=2)
    slots = made.slots
    changed = [*made.state, *(t for s in slots for name, t in s.named() if name != "gradient")]
    kept = [made.settings, *(slot.gradient for slot in slots)]
    before = [tensor._version for tensor in changed], [tensor._version for tensor in kept]
    with use_backend(adamw_ema=backend):
        made.step()
    assert all(tensor._version > version for tensor, version in zip(changed, before[0], strict=True))
    assert [tensor._version for tensor in kept] == before[1]


@pytest.mark.parametrize("name", ["gradient", "parameter", "exp_avg", "exp_avg_sq", "emas"])
def test_a_table_of_other_tensors_is_refused(name):
    """As where a tensor was freed, and another one is at its place in the lists."""
    made = problem()
    table = TensorTable(DEVICE)
    table.update(made.slots)
    before = [tensor.clone() for slot in made.slots for _, tensor in slot.named() if tensor is not None]
    moved = getattr(made.slots[1], name)
    other = moved.clone() if isinstance(moved, torch.Tensor) else tuple(ema.clone() for ema in moved)
    slots = [made.slots[0], made.slots[1]._replace(**{name: other}), *made.slots[2:]]
    with pytest.raises(
        ValueError, match=rf"table must be that of these tensors, got one with other {name.removesuffix('s')}s"
    ):
        adamw_ema(slots, table, made.settings, torch.tensor(1.0, device=DEVICE), made.state)
    with pytest.raises(ValueError, match="table must be that of these tensors"):
        adamw_ema(made.slots[:2], table, made.settings, torch.tensor(1.0, device=DEVICE), made.state)
    if name == "gradient":
        with pytest.raises(ValueError, match="grad_norm: table must be that of these tensors"):
            grad_norm([slot.gradient for slot in slots], table)
    kept = [tensor for slot in made.slots for _, tensor in slot.named() if tensor is not None]
    assert all(torch.equal(*pair) for pair in zip(before, kept, strict=True))


def test_it_goes_through_torchs_dispatcher_and_into_a_graph():
    made, plain = problem(), problem()
    flat = Slots.of(made.slots)
    table = TensorTable(DEVICE)
    table.update(made.slots)
    norm = torch.tensor(2.0, device=DEVICE)
    arguments = (table.rows, table.places, CHUNK, made.settings, norm, 0, 1, *made.state, *flat, "reference")
    torch.library.opcheck(torch.ops.erd_fast.adamw_ema_fwd.default, arguments)

    other = TensorTable(DEVICE)
    other.update(plain.slots)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(slots: Slots) -> None:
        adamw_ema(slots, other, plain.settings, norm, plain.state)

    with use_backend(adamw_ema="reference"):
        fresh = problem()
        own = TensorTable(DEVICE)
        own.update(fresh.slots)
        adamw_ema(fresh.slots, own, fresh.settings, norm, fresh.state)
        compiled(Slots.of(plain.slots))
    assert all(torch.equal(a, b) for a, b in zip(fresh.tensors(), plain.tensors(), strict=True))


def test_a_launch_that_fails_is_not_tried_again_elsewhere(monkeypatch):
    """It may have changed something already."""
    made = problem()

    def fails(*arguments):
        raise RuntimeError("half way")

    monkeypatch.setattr(OPS["adamw_ema"].available()[0], "run", fails)
    with pytest.raises(RuntimeError, match="half way"):
        made.step()
    assert made.state.counts.tolist() == [0, 0, 0]
