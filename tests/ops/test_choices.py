"""What is chosen by time, and what happens to a backend that fails: on a toy op, y = 2 x, with backends made here."""

import threading
import time
from collections.abc import Callable, Iterator
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


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What ``call`` gives in a thread with no context of its own, as autograd's threads for GPUs are."""
    given: dict[str, Any] = {}

    def run() -> None:
        try:
            given["result"] = call()
        except Exception as error:
            given["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in given:
        raise given["error"]
    return given["result"]


def here(call: Callable[[], Any]) -> Any:
    return call()


WAYS = pytest.mark.parametrize("way", [here, in_a_thread])
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def toy_own(compiled: bool) -> Callable[[Tensor], Outputs]:
    op = OPS["toy_own"]
    return torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager") if compiled else op


@WAYS
@COMPILED
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_backend_of_the_forward_pass_runs_the_backward_pass(way, compiled):
    call, x = toy_own(compiled), torch.ones(3, requires_grad=True)
    for name, ran in (("reference", "reference"), ("cpu", ""), ("auto", ""), ("reference", "reference")):
        CALLS.clear()
        with use_backend(toy_own=name):
            y = call(x)[0].sum()
        (dx,) = way(lambda y=y: torch.autograd.grad(y, x))
        assert dx.tolist() == [2, 2, 2]
        assert [*CALLS] == [f"{direction} {ran}".strip() for direction in ("forward", "backward")]


@WAYS
@COMPILED
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_is_requested_around_the_backward_pass_does_not_change_it(way, compiled, monkeypatch):
    x = torch.ones(3, requires_grad=True)
    monkeypatch.setenv("ERD_FAST_BACKEND", "toy_own=reference")
    with use_backend("auto"):  # which a backward thread does not see, unlike the variable
        y = toy_own(compiled)(x)[0].sum()
    way(lambda: torch.autograd.grad(y, x))
    monkeypatch.delenv("ERD_FAST_BACKEND")
    y = toy_own(compiled)(x)[0].sum()

    def within() -> Any:
        with use_backend(toy_own="reference"):
            return torch.autograd.grad(y, x)

    way(within)
    assert [*CALLS] == ["forward", "backward"] * 2


@WAYS
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_graph_takes_the_backend_that_the_environment_names(way, monkeypatch):
    torch.compiler.reset()  # a graph keeps the variable that it was made under
    monkeypatch.setenv("ERD_FAST_BACKEND", "toy_own=reference")
    x = torch.ones(3, requires_grad=True)
    y = toy_own(compiled=True)(x)[0].sum()
    way(lambda: torch.autograd.grad(y, x))
    torch.compiler.reset()
    assert [*CALLS] == ["forward reference", "backward reference"]


@WAYS
@COMPILED
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("requested", ["cpu", "auto"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_backend_that_fails_raises_and_the_remedy_is_named(way, compiled, where, requested):
    BROKEN.add(where)
    x = torch.ones(3, requires_grad=True)

    def both() -> None:
        with use_backend(toy_own=requested):
            y = toy_own(compiled)(x)[0].sum()
        way(lambda: torch.autograd.grad(y, x))

    with pytest.raises(RuntimeError, match="shared memory") as caught:
        both()
    assert f"the {where} pass of toy_own failed on backend cpu; ERD_FAST_BACKEND=toy_own=reference" in str(
        caught.value.__notes__
    )
    assert not [name for name in CALLS if "reference" in name]


@COMPILED
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_requested_backend_that_is_not_there_raises(compiled):
    with use_backend(toy_own="triton"), pytest.raises(BackendUnavailableError, match="toy_own has no triton backend"):
        toy_own(compiled)(torch.ones(3))
    with use_backend(toy_timed="gone"), pytest.raises(BackendUnavailableError, match="it is not installed"):
        OPS["toy_timed"](torch.ones(3))


def test_an_op_that_is_part_of_something_larger_is_timed_in_it():
    seen = []
    with choices.probing():
        assert OPS["toy_timed"].choose(torch.ones(3), whole=lambda: seen.append(None)) in ("slow", "quick")
    assert seen and not CALLS
