"""Which backend is the fastest, where that depends on the form of the arguments: timed once, kept, and stored.

A timed op takes what is stored for the form of its arguments. Within :func:`probing` a form that is met for the first
time is timed on the backends that can take it, forward and backward; elsewhere it takes the first of them. A run probes
in its first step and keeps :func:`stored` as ``kernels.json``, which :func:`load` reads when it goes on.
"""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from erd_fast.errors import ConfigError
from erd_fast.ops.backends import use_backend

_CALLS, _ROUNDS = 5, 7
_log = logging.getLogger("erd_fast.ops")
_stored: dict[str, dict[str, str]] = {}
_probing = False


def form_of(args: Sequence[Any]) -> str:
    """Shapes, dtypes and other arguments of a call: what a backend's success and speed depend on."""
    return ", ".join(_form(arg) for arg in args)


def _form(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}"
    if isinstance(arg, list) and any(isinstance(item, Tensor) for item in arg):
        return f"{len(arg)} tensors"
    return str(arg).removeprefix("torch.")


def chosen(op: str, form: str) -> str | None:
    """The stored backend for arguments of this form."""
    return _stored.get(op, {}).get(form)


def stored() -> dict[str, dict[str, str]]:
    """op -> form of the arguments -> backend, of all that was timed or loaded."""
    return {op: dict(forms) for op, forms in sorted(_stored.items())}


def load(choices: Any, source: str) -> None:
    """Take over what :func:`stored` gave before, from ``source``.

    Raises:
        ConfigError: it has another form.
    """
    right = isinstance(choices, dict) and all(
        isinstance(forms, dict) and all(isinstance(name, str) for name in forms.values()) for forms in choices.values()
    )
    if not right:
        raise ConfigError(f"{source}: given {choices!r}, allowed backends by op and form of its arguments")
    for op, forms in choices.items():
        _stored.setdefault(op, {}).update(forms)


def forget() -> None:
    """Drop all that was timed or loaded."""
    _stored.clear()


@contextlib.contextmanager
def probing() -> Iterator[None]:
    """Time new forms of arguments within this block."""
    global _probing
    before, _probing = _probing, True
    try:
        yield
    finally:
        _probing = before


def probe(op: Any, args: tuple[Any, ...], whole: Callable[[], Any] | None = None) -> str | None:
    """Within :func:`probing`, time the backends of ``op`` for ``args`` and store the fastest; elsewhere None.

    The reference takes no part, and a single backend is not stored: there was nothing to choose. ``whole`` is timed in
    place of the op alone, where the op is a part of something larger.
    """
    global _probing
    if not _probing or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return None
    names = [name for name in op.candidates(op.forward, args) if name != "reference"]
    if len(names) < 2:
        return None
    seconds: dict[str, float] = {}
    _probing = False  # the calls below are calls of the op itself
    try:
        for name in names:
            with use_backend(**{op.name: name}):
                try:
                    seconds[name] = _time(whole or _call_of(op, args))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    _log.warning("%s: backend %s fails and is left out: %s", op.name, name, error)
    finally:
        _probing = True
    if not seconds:
        return None
    best = min(seconds, key=seconds.__getitem__)
    _stored.setdefault(op.name, {})[form_of(args)] = best
    _log.info("%s: %s is the fastest of %s", op.name, best, {name: f"{s:.3g} s" for name, s in seconds.items()})
    return best


def _call_of(op: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
    """A call of the op, forward and, where an argument requires a gradient, backward."""
    inputs = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    with_gradient = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in inputs)

    def call() -> None:
        output = op(*inputs)[0]
        if with_gradient:
            leaves = [arg for arg in inputs if isinstance(arg, Tensor) and arg.requires_grad]
            torch.autograd.grad(output, leaves, output)

    return call


def _time(call: Callable[[], Any]) -> float:
    """Seconds of one call."""

    def sample() -> float:
        began = _clock()
        for _ in range(_CALLS):
            call()
        return (_clock() - began) / _CALLS

    sample()  # what is compiled or allocated by a first call
    return statistics.median(sample() for _ in range(_ROUNDS))


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
