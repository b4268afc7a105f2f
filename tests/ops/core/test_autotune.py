"""Which backend runs forward and backward, what is timed, what fails: on a toy op, y = factor x, with backends of its
own."""

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from erd_fast.errors import BackendUnavailableError, ConfigError
from erd_fast.ops import OPS, Autotuner, Recording, autotune, explain, record, use_backend
from erd_fast.ops.availability import Reason
from erd_fast.ops.core.backend import Backend, External
from erd_fast.ops.core.op import Op, Pass

CPU = torch.device("cpu")
CALLS: list[str] = []
BROKEN: set[str] = set()


class Doubled(NamedTuple):
    y: Tensor
    spare: Tensor | None = None


class Gradients(NamedTuple):
    dx: Tensor


def forward(x: Tensor, factor: float) -> Doubled:
    CALLS.append("forward reference")
    return Doubled(x * factor, x.new_empty(0))


def empty(x: Tensor, **_: Any) -> Doubled:
    return Doubled(torch.empty_like(x), x.new_empty(0))


def backward(dy: Tensor, factor: float) -> Gradients:
    CALLS.append("backward reference")
    return Gradients(dy * factor)


def backward_empty(dy: Tensor, **_: Any) -> Gradients:
    return Gradients(torch.empty_like(dy))


class Kernels(Backend):
    """Kernels that this test makes: it fills the outputs."""

    def run(self, direction: Pass, device: torch.device, args: dict[str, Any]) -> Any:
        CALLS.append(direction.name)
        if direction.name in BROKEN:
            raise RuntimeError("out of resource: shared memory")
        outputs = direction.empty(**args)
        torch.mul(args[direction.leader], args["factor"], out=outputs[0])
        return outputs


def external(name: str, seconds: float = 0.0, reason: Reason | None = None, priority: int = 0) -> External:
    def call(x: Tensor, factor: float) -> Tensor:
        CALLS.append(name)
        time.sleep(seconds)
        if name in BROKEN:
            raise RuntimeError("head dimension 72 is too large")
        return factor * x

    return External(name, call, unavailable=lambda: reason, device="", priority=lambda: priority)


def toy(name: str, *backends: Backend, timed: bool = False) -> Op:
    return Op(name, Pass(forward, empty), backward=Pass(backward, backward_empty), backends=backends, timed=timed)


@pytest.fixture(scope="module")
def ops() -> Iterator[None]:
    gone = external("gone", reason=Reason("it is not installed", "install it"))
    toy("toy_timed", external("last", 4e-3, priority=1), gone, external("slow", 2e-3), external("quick"), timed=True)
    toy("toy_own", Kernels("cpu", "cpu", lambda x, factor: "it takes up to 8 numbers" if len(x) > 8 else None))
    yield
    del OPS["toy_timed"], OPS["toy_own"]


@pytest.fixture(autouse=True)
def clean(ops: None) -> None:
    CALLS.clear()
    BROKEN.clear()


def timed(x: Tensor) -> Any:
    return OPS["toy_timed"](x=x, factor=2.0)


def test_the_fastest_is_chosen_once_for_a_signature_and_kept():
    x = torch.ones(3, requires_grad=True)
    assert timed(x).y.tolist() == [2, 2, 2] and CALLS == ["slow"]  # without a tuner the first that can run
    with autotune() as tuner:
        assert timed(x).y.tolist() == [2, 2, 2]
        assert set(CALLS) == {"slow", "quick", "last"}
        CALLS.clear()
        timed(x)
        tuner.timing = False
        timed(x)
        assert CALLS == ["quick", "quick"]
        assert explain("toy_timed").startswith("toy_timed takes slow, the first that can run")
        timed(torch.ones(4))
        assert CALLS[-1] == "slow"  # a signature that was not timed
        with use_backend(toy_timed="slow"):
            timed(x)
        assert CALLS[-1] == "slow"
    assert tuner.choices(CPU) == {"toy_timed": {"float32[3] with gradient, 2.0": "quick"}}
    timed(x)
    assert CALLS[-1] == "slow"  # nothing is remembered outside


def test_what_was_stored_is_taken_unless_it_is_missing():
    tuner = Autotuner(timing=False)
    tuner.load({"toy_timed": {"float32[3], 2.0": "quick", "float32[4], 2.0": "gone"}}, CPU, "kernels.json")
    with autotune(tuner):
        timed(torch.ones(3))
        timed(torch.ones(4))
    assert CALLS == ["quick", "slow"]
    for wrong in (None, [], {"toy_timed": "quick"}, {"toy_timed": {"float32[3]": 5}}):
        with pytest.raises(ConfigError, match=r"kernels\.json: choices must map ops to signatures to backends"):
            tuner.load(wrong, CPU, "kernels.json")


def test_choices_belong_to_a_device():
    tuner = Autotuner(timing=False)
    tuner.load({"toy_timed": {"float32[3], 2.0": "quick"}}, torch.device("meta"), "kernels.json")
    with autotune(tuner):
        timed(torch.ones(3))
    assert CALLS == ["slow"] and tuner.choices(CPU) == {}


def test_what_fails_while_it_is_timed_is_left_out_and_the_reason_kept(caplog):
    BROKEN.add("quick")
    with autotune() as tuner:
        timed(torch.ones(3))
    assert tuner.choices(CPU) == {"toy_timed": {"float32[3], 2.0": "slow"}}
    assert tuner.left_out == {"toy_timed: quick: float32[3], 2.0": "head dimension 72 is too large"}
    assert "backend quick fails and is left out: head dimension 72" in caplog.text


def test_a_late_backend_is_tried_after_the_others():
    order = [backend.name for backend in OPS["toy_timed"].available()]
    assert order == ["slow", "quick", "last", "reference"]


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


def toy_own(compiled: bool) -> Callable[[Tensor], Any]:
    op = OPS["toy_own"]

    def call(x: Tensor) -> Any:
        return op(x=x, factor=2.0)

    return torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call


@WAYS
@COMPILED
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_backend_of_the_forward_pass_runs_the_backward_pass(way, compiled):
    call, x = toy_own(compiled), torch.ones(3, requires_grad=True)
    for name, ran in (("reference", "reference"), ("cpu", ""), ("auto", ""), ("reference", "reference")):
        CALLS.clear()
        with use_backend(toy_own=name):
            y = call(x).y.sum()
        (dx,) = way(lambda y=y: torch.autograd.grad(y, x))
        assert dx.tolist() == [2, 2, 2]
        assert [*CALLS] == [f"{direction} {ran}".strip() for direction in ("forward", "backward")]


@WAYS
@COMPILED
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_is_requested_around_the_backward_pass_does_not_change_it(way, compiled):
    x = torch.ones(3, requires_grad=True)
    y = toy_own(compiled)(x).y.sum()

    def within() -> Any:
        with use_backend(toy_own="reference"):
            return torch.autograd.grad(y, x)

    way(within)
    assert [*CALLS] == ["forward", "backward"]


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
            y = toy_own(compiled)(x).y.sum()
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
        timed(torch.ones(3))


@COMPILED
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_arguments_that_a_backend_cannot_take_go_to_the_next(compiled):
    x = torch.ones(9, requires_grad=True)
    y = toy_own(compiled)(x).y.sum()
    torch.autograd.grad(y, x)
    assert CALLS == ["forward reference", "backward reference"]
    with (
        use_backend(toy_own="cpu"),
        pytest.raises(BackendUnavailableError, match=r"toy_own: .* cpu .* it takes up to 8"),
    ):
        toy_own(compiled)(x)


def test_an_op_that_is_part_of_something_larger_is_timed_in_it():
    seen = []
    with autotune():
        chosen = OPS["toy_timed"].choose({"x": torch.ones(3), "factor": 2.0}, call=lambda it: seen.append(it.name))
    assert chosen.name in set(seen) == {"slow", "quick", "last"} and not CALLS


def test_a_recording_has_what_ran_in_threads_too():
    x = torch.ones(3)
    with record() as recording:
        toy_own(compiled=False)(x)
        in_a_thread(lambda: toy_own(compiled=False)(x))  # without context
        with use_backend(toy_own="reference"):
            context = contextvars.copy_context()
        in_a_thread(lambda: context.run(toy_own(compiled=False), x))
    toy_own(compiled=False)(x)
    assert recording.backends == {"toy_own": ["cpu", "reference"]}


def test_a_recording_leaves_out_what_was_timed():
    x = torch.ones(3)
    with autotune(), record() as recording:
        timed(x)
    assert recording.backends == {"toy_timed": ["quick"]} and {"slow", "last"} < set(CALLS)


def test_explaining_times_nothing():
    x = torch.ones(3, requires_grad=True)
    with autotune() as tuner, record(Recording(dry=True)):
        timed(x)
    assert not CALLS and not tuner.choices(CPU) and not tuner.left_out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_compiled_code_raises_where_another_backend_is_requested():
    """In a copied context: torch.compile sees only what its own thread entered."""
    torch.compiler.reset()
    x, function = torch.ones(3), toy_own(compiled=True)
    function(x)
    with use_backend(toy_own="reference"):
        copied = contextvars.copy_context()
        assert function(x).y.tolist() == [2, 2, 2] and CALLS[-1] == "forward reference"
    with pytest.raises(ConfigError, match="toy_own: compiled code runs it on cpu, but reference is requested"):
        in_a_thread(lambda: copied.run(function, x))


def test_blocks_of_tasks_that_overlap_leave_nothing_behind():
    async def task(backend: str, seconds: float) -> None:
        with use_backend(toy_own=backend):
            await asyncio.sleep(seconds)

    async def both() -> None:
        await asyncio.gather(task("cpu", 0.01), task("reference", 0.02))

    asyncio.run(both())
    toy_own(compiled=True)(torch.ones(3))
    assert [*CALLS] == ["forward"]


def test_a_dry_recording_runs_nothing():
    with record(Recording(dry=True)) as recording:
        assert toy_own(compiled=False)(torch.ones(3, requires_grad=True)).y.shape == (3,)
    assert not CALLS and [call[:2] for call in recording.calls] == [("toy_own", "cpu")]
