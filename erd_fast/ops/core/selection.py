"""Which backend is requested, by ``ERD_FAST_BACKEND`` or ``use_backend``, and an explanation of what a call takes.

``auto``, the default, takes the first of an op's backends that is available and supports the call. A requested backend
runs or raises.
"""

import contextlib
import contextvars
import functools
import importlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from erd_fast.errors import ConfigError, unknown_name
from erd_fast.ops.core.autotune import active_autotuner
from erd_fast.ops.core.recording import Recording, record

if TYPE_CHECKING:
    from erd_fast.ops.core.op import Op

OPS: dict[str, "Op"] = {}
"""Every declared op by its name."""
BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In the order in which ``auto`` tries them, if an op has no order of its own."""
_VARIABLE = "ERD_FAST_BACKEND"
_ENVIRONMENT = os.environ.get(_VARIABLE, "")
_request: contextvars.ContextVar[str] = contextvars.ContextVar("erd_fast_backend", default=_ENVIRONMENT)


class _Traced(threading.local):
    """The same request where torch.compile can read it and guard its graphs by it: torch 2.11 traces no ContextVar, and
    of a thread-local object no attribute of its class."""

    def __init__(self) -> None:
        self.request = _ENVIRONMENT


_traced = _Traced()


@contextlib.contextmanager
def use_backend(choice: str = "", **ops: str) -> Iterator[None]:
    """Run ops on named backends within a ``with`` block: ``use_backend("triton")`` for all ops that have it,
    ``use_backend(q_sample="cpu", draw="reference")`` or ``use_backend("q_sample=cpu,draw=reference")`` for single ones.

    The block's choice overrides that of ``ERD_FAST_BACKEND``, which is read when ops are imported; ``auto`` is a name
    too. A backward pass runs on the backend of its forward pass in any thread. A forward pass that
    torch.utils.checkpoint recomputes on a GPU runs in a thread of autograd, which sees the variable but not the block;
    ``context_fn`` of checkpoint can enter it there. Eager code sees the block in a copied context too, compiled code
    only in the thread that entered it, and raises elsewhere.

    Raises:
        ConfigError: unknown backend or op.
    """
    text = ",".join(filter(None, (choice, *(f"{op}={backend}" for op, backend in ops.items()))))
    _parsed(text, "use_backend")
    token = _request.set(text)
    _traced.request = text
    try:
        yield
    finally:
        _request.reset(token)
        _traced.request = _request.get()


def requested(op: str) -> str | None:
    """The backend that is requested for ``op``; None is auto. torch.compile has :func:`requested_while_tracing`."""
    text = _request.get()
    return _requested(text, op) if text else None


def requested_while_tracing(op: str) -> str | None:
    """:func:`requested` as a constant of a graph; another ``use_backend`` block recompiles."""
    return _requested(_traced.request, op)


def _requested(text: str, op: str) -> str | None:
    choice = _parsed(text, _VARIABLE)
    general = choice.get("")
    named = choice.get(op, general if general in OPS[op].backends else None)
    return None if named == "auto" else named


def check_request(op: str, backend: str) -> None:
    """Raise ConfigError if a graph was compiled for another backend than the one that is requested where it runs."""
    name = requested(op)
    if name not in (None, backend):
        raise ConfigError(
            f"{op}: compiled code runs it on {backend}, but {name} is requested by a use_backend that another thread "
            f"entered; enter it in the thread that calls the compiled function"
        )


def usable(op: str, backend: str) -> bool:
    """Whether this machine has the backend."""
    return OPS[op].why_not(backend) is None


def available(op: str) -> str:
    """Names of our backends for ``op`` that this machine has, first the one that ``auto`` tries first, with commas."""
    return ",".join(backend.name for backend in OPS[op].available() if backend.name in BACKENDS)


# What torch.compiler.assume_constant_result sets, which imports the compiler to do so. The text is guarded.
_requested._dynamo_marked_constant = True  # type: ignore[attr-defined]
usable._dynamo_marked_constant = True  # type: ignore[attr-defined]
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _parsed(text: str, where: str) -> dict[str, str]:
    """``"triton"`` is {"": "triton"}; ``"q_sample=cuda,draw=cpu"`` is {"q_sample": "cuda", "draw": "cpu"}."""
    choice: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, _, backend = part.rpartition("=")
        if op and op not in OPS:
            raise ConfigError(f"{where}: {unknown_name('op', op, OPS)}")
        allowed = dict.fromkeys((*BACKENDS, *(name for declared in OPS.values() for name in declared.backends), "auto"))
        if backend not in allowed:
            raise ConfigError(f"{where}: {unknown_name('backend', backend, allowed)}")
        choice[op] = backend
    return choice


def explain(function: str, *args: Any, **how: Any) -> str:
    """Which backend a function of :mod:`erd_fast.ops` takes, and why not the others: for a call with these arguments,
    which is not run, or without any in general.

    Raises:
        ConfigError: unknown function. ValueError: arguments that the op does not allow.
    """
    if not args and not how and function in OPS:
        op = OPS[function]
        return _explanation(op, requested(function) or op.available()[0].name, None)
    if function not in (*OPS, "gelu_mlp"):
        raise ConfigError(unknown_name("op", function, OPS))
    with record(Recording(dry=True)) as dry:
        getattr(importlib.import_module("erd_fast.ops"), function)(*args, **how)
    if not dry.calls:
        return f"{function} takes its differentiable reference: the call is traced, transformed, or needs a gradient"
    return "\n".join(_explanation(OPS[name], backend, call) for name, backend, call in dry.calls)


def _explanation(op: "Op", chosen: str, args: dict[str, Any] | None) -> str:
    tuner = active_autotuner() if op.timed and args else None
    why = "the first that can run"
    if requested(op.name):
        why = "requested" if op.why_not(chosen, args) is None else "requested, and raises"
    elif op.traced is not None and chosen == op.traced.name:
        why = "PyTorch's own function, on the meta device and under dispatch modes"
    elif tuner is not None and args and tuner.known(op, args) == chosen:
        why = "the fastest of those timed"
    reasons = [f"  {name}: {op.why_not(name, args) or 'can run'}" for name in dict.fromkeys((*op.backends, *BACKENDS))]
    return "\n".join([f"{op.name} takes {chosen}, {why}", *reasons])
