"""Timing the backends of an op, where the fastest depends on the shapes and dtypes of its arguments."""

import contextlib
import contextvars
import functools
import logging
import statistics
import timeit
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erd_fast.errors import ConfigError
from erd_fast.numerics import is_out_of_memory
from erd_fast.ops.core.recording import active_recording, record

if TYPE_CHECKING:
    from erd_fast.ops.core.backend import Backend
    from erd_fast.ops.core.op import Args, Op

Choices = dict[str, dict[str, str]]
"""op -> signature of its arguments -> backend."""

_CALLS, _ROUNDS = 5, 7
_active: contextvars.ContextVar["Autotuner | None"] = contextvars.ContextVar("erd_fast_autotuner", default=None)
_log = logging.getLogger("erd_fast.ops")


class Autotuner:
    """The fastest backend by device, op and signature. Signatures that it does not know keep the static order.

    Attributes:
        timing: whether an unknown signature is timed at its first call.
        captured: whether calls on a GPU are timed in a CUDA graph, as a captured training step runs them.
        left_out: "op: backend: signature" -> why the backend failed while it was timed.
    """

    def __init__(self, timing: bool = True, captured: bool = True):
        self.timing, self.captured = timing, captured
        self.left_out: dict[str, str] = {}
        self._choices: dict[str, Choices] = {}
        self._found: dict[tuple[Any, ...], str | None] = {}  # what fastest() gave: a signature takes longer

    def choices(self, device: torch.device) -> Choices:
        """What was timed or loaded for devices of this model."""
        return {op: dict(found) for op, found in sorted(self._choices.get(device_name(device), {}).items())}

    def load(self, choices: Any, device: torch.device, source: str) -> None:
        """Adopt what :meth:`choices` returned, from ``source``.

        Raises:
            ConfigError: it has another structure.
        """
        valid = isinstance(choices, dict) and all(
            isinstance(found, dict) and all(isinstance(name, str) for name in found.values())
            for found in choices.values()
        )
        if not valid:
            raise ConfigError(f"{source}: choices must map ops to signatures to backends, got {choices!r}")
        self._found.clear()
        for op, found in choices.items():
            self._choices.setdefault(device_name(device), {}).setdefault(op, {}).update(found)

    def fastest(self, op: "Op", args: "Args", call: "Callable[[Backend], Any] | None" = None) -> str | None:
        """The fastest backend for these arguments, timed by ``call(backend)``; None if the static order decides."""
        device, grad = op.device(args), torch.is_grad_enabled()
        values = [(it.shape, it.dtype, it.requires_grad) if isinstance(it, Tensor) else it for it in args.values()]
        key = (op.name, device, grad, *values)
        if key not in self._found:
            if capturing(device) or ((recording := active_recording()) and recording.dry):
                return self.known(op, args)
            self._found[key] = self.known(op, args) or self._timed(op, args, call or op.timed_call(args))
        return self._found[key]

    def known(self, op: "Op", args: "Args") -> str | None:
        """The backend that was timed or loaded for these arguments."""
        known = self._choices.get(device_name(op.device(args)), {})
        return known.get(op.name, {}).get(signature(args.values()))

    def _timed(self, op: "Op", args: "Args", call: "Callable[[Backend], Any]") -> str | None:
        """Time each backend that can run these arguments, and keep the fastest. The reference is left out, and so is a
        single backend: there is nothing to choose."""
        backends = [backend for backend in op.candidates(args) if backend.name != "reference"]
        if not self.timing or len(backends) < 2:
            return None
        device, seconds = op.device(args), dict[str, float]()
        for backend in backends:
            try:
                with record():  # what is tried is not what the caller ran
                    seconds[backend.name] = self._seconds(functools.partial(call, backend), device)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.left_out[f"{op.name}: {backend.name}: {signature(args.values())}"] = str(error)
                _log.warning("%s: backend %s fails and is left out: %s", op.name, backend.name, error)
        if not seconds:
            return None
        best = min(seconds, key=seconds.__getitem__)
        self.load({op.name: {signature(args.values()): best}}, device, "autotuning")
        _log.info("%s: %s is the fastest of %s", op.name, best, {name: f"{s:.3g} s" for name, s in seconds.items()})
        return best

    def _seconds(self, call: Callable[[], Any], device: torch.device) -> float:
        """Median seconds of a call."""
        if device.type != "cuda":
            call()  # compiles and allocates
            return statistics.median(timeit.repeat(call, repeat=_ROUNDS, number=_CALLS)) / _CALLS
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            call()
            repeat = _captured(call, stream) if self.captured else lambda: [call() for _ in range(_CALLS)]
            events = [torch.cuda.Event(enable_timing=True) for _ in range(_ROUNDS + 1)]
            events[0].record()
            for event in events[1:]:
                repeat()
                event.record()
        stream.synchronize()
        return statistics.median(map(torch.cuda.Event.elapsed_time, events, events[1:])) * 1e-3 / _CALLS


@contextlib.contextmanager
def autotune(tuner: Autotuner | None = None) -> Iterator[Autotuner]:
    """Choose by ``tuner`` within this block, and in threads that run in a copy of its context. By default a new one,
    which times every signature at its first call."""
    tuner = Autotuner() if tuner is None else tuner
    token = _active.set(tuner)
    try:
        yield tuner
    finally:
        _active.reset(token)


active_autotuner = _active.get


def signature(values: Iterable[Any]) -> str:
    """Shapes, dtypes and other arguments of a call: what a backend's success and speed depend on."""
    return ", ".join(_tensor(it) if isinstance(it, Tensor) else str(it).removeprefix("torch.") for it in values)


def _tensor(it: Tensor) -> str:
    with_gradient = it.requires_grad and torch.is_grad_enabled()
    return f"{str(it.dtype).removeprefix('torch.')}{list(it.shape)}{' with gradient' * with_gradient}"


def device_name(device: torch.device) -> str:
    """The GPU's model, so that a choice holds for every such GPU; else the type of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def capturing(device: torch.device) -> bool:
    """Whether launches on the current stream of ``device`` are recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _captured(call: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            call()
    return graph.replay
