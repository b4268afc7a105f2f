"""What is chosen by time, and what happens to a backend that fails: on a toy op, y = 2 x, with backends made here."""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.errors import BackendUnavailableError, ConfigError
from erd_fast.ops import OPS, choices, use_backend
from erd_fast.ops.declare import Gradient, Library, Op, Outputs, Pass, declare

CALLS: list[str] = []
BROKEN: set[str] = set()


def library(name: str, seconds: float = 0.0, absence: tuple[str, str] | None = None) -> Library:
    def call(x: Tensor) -> Outputs:
        CALLS.append(name)
        time.sleep(seconds)
        if name in BROKEN:
            raise RuntimeError("head dimension 72 is too large")
        return (2 * x,)

    return Library(call, lambda: absence, device="")


def own(name: str, factor: float) -> Any:
    """A pass whose kernel is the C++ twin of nobody: ``launch`` does it."""

    def launch(kernel: Any, inputs: tuple[Any, ...], outputs: Outputs) -> None:
        CALLS.append(name)
        if name in BROKEN:
            raise RuntimeError("out of resource: shared memory")
        torch.mul(inputs[0], factor, out=outputs[0])

    def body(x: Tensor) -> Outputs:
        CALLS.append(f"{name} reference")
        return x * factor, x.new_empty(0)

    return Pass("(Tensor x) -> (Tensor, Tensor)", body, lambda x: (torch.empty_like(x), x.new_empty(0)), launch)


def toy(name: str, **how: Any) -> Op:
    op = declare(name, own("forward", 2.0), backward=own("backward", 2.0), gradient=Gradient(_keep, _backward), **how)
    op._kernel = lambda *_: print  # type: ignore[method-assign]
    return op


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.backend = inputs[-1]


def _backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor]:
    op = OPS["toy_own"]
    return (op.differentiate(dy, backend=ctx.backend)[0],)


@pytest.fixture(scope="module")
def ops() -> Iterator[None]:
    toy(
        "toy_timed",
        backends=("gone", "slow", "quick"),
        libraries={
            "gone": library("gone", absence=("it is not installed", "install it")),
            "slow": library("slow", 2e-3),
            "quick": library("quick"),
        },
        timed=True,
    )
    toy("toy_own", backends=("cpu",))
    yield
    del OPS["toy_timed"], OPS["toy_own"]


@pytest.fixture(autouse=True)
def clean(ops: None) -> Iterator[None]:
    before = choices.stored()
    choices.forget()
    CALLS.clear()
    BROKEN.clear()
    OPS["toy_own"]._dropped.clear()
    OPS["toy_timed"]._dropped.clear()
    yield
    choices.forget()
    choices.load(before, "the tests")


def test_the_fastest_is_chosen_once_a_form_and_kept():
    x = torch.ones(3, requires_grad=True)
    op = OPS["toy_timed"]
    assert op(x)[0].tolist() == [2, 2, 2] and CALLS == ["slow"]  # outside, the first that can run
    with choices.probing():
        assert op(x)[0].tolist() == [2, 2, 2]
    assert choices.stored() == {"toy_timed": {"float32[3]": "quick"}}
    assert set(CALLS) == {"slow", "quick"}
    CALLS.clear()
    with choices.probing():
        op(x)
    op(x)
    assert CALLS == ["quick", "quick"] and op.used == "quick"
    op(torch.ones(4))
    assert CALLS[-1] == "slow"  # another form, which nobody timed
    with use_backend(toy_timed="slow"):
        op(x)
    assert CALLS[-1] == "slow"


def test_a_run_goes_on_with_what_it_stored_unless_it_is_not_here():
    choices.load({"toy_timed": {"float32[3]": "quick", "float32[4]": "gone"}}, "kernels.json")
    op = OPS["toy_timed"]
    op(torch.ones(3))
    op(torch.ones(4))
    assert CALLS == ["quick", "slow"]
    for wrong in (None, [], {"toy_timed": "quick"}, {"toy_timed": {"float32[3]": 5}}):
        with pytest.raises(ConfigError, match=r"kernels\.json: given .* allowed backends by op"):
            choices.load(wrong, "kernels.json")


def test_what_fails_while_it_is_timed_is_left_out(caplog):
    BROKEN.add("quick")
    with choices.probing():
        OPS["toy_timed"](torch.ones(3))
    assert choices.stored() == {"toy_timed": {"float32[3]": "slow"}}
    assert "backend quick fails and is left out: head dimension 72" in caplog.text


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_backend_that_fails_is_dropped_for_that_form_with_one_warning(where):
    BROKEN.add(where)
    x, op = torch.ones(3, requires_grad=True), OPS["toy_own"]
    with pytest.warns(RuntimeWarning, match=rf"toy_own: backend cpu failed in its {where} pass .* shared memory"):
        (dx,) = torch.autograd.grad(op(x)[0].sum(), x)
    assert dx.tolist() == [2, 2, 2] and f"{where} reference" in CALLS
    CALLS.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (dx,) = torch.autograd.grad(op(x)[0].sum(), x)
    assert dx.tolist() == [2, 2, 2] and where not in CALLS
    BROKEN.clear()
    op(torch.ones(4))
    assert CALLS[-1] == "forward"  # other forms keep it


def test_a_backend_that_was_asked_for_and_fails_raises():
    BROKEN.add("forward")
    with use_backend(toy_own="cpu"), pytest.raises(RuntimeError, match="shared memory"):
        OPS["toy_own"](torch.ones(3))
    with use_backend(toy_timed="gone"), pytest.raises(BackendUnavailableError, match="it is not installed"):
        OPS["toy_timed"](torch.ones(3))


def test_an_op_that_is_part_of_something_larger_is_timed_in_it():
    seen = []
    with choices.probing():
        assert OPS["toy_timed"].choose(torch.ones(3), whole=lambda: seen.append(None)) in ("slow", "quick")
    assert seen and not CALLS
