"""Declaring an op: its definition, its outputs, its backends, its gradient; and running it on one of the backends.

::

    op = declare("q_sample", Pass(SCHEMA, body=_body, outputs=_outputs, launch=_launch), backends=("cuda", "triton"))
    x_t, target = op(latents, ...)

makes ``torch.ops.erd_fast.q_sample_fwd``, whose flat arguments are the schema's and the backend's name; an op with a
backward pass has ``..._bwd`` too. ``outputs`` gives empty tensors of the right form: it is the fake of torch.compile,
and allocates what a kernel fills. The kernels of a pass take the same flat arguments on every backend and return
nothing; ``launch`` says which.
"""

import contextvars
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from erd_fast.errors import BackendUnavailableError
from erd_fast.ops import choices
from erd_fast.ops.backends import OPS, absence, asked_for, interpreted
from erd_fast.ops.choices import form_of

Outputs = tuple[Tensor, ...]
Support = Callable[..., str | None]
explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("erd_fast_explaining", default=False)
_log = logging.getLogger("erd_fast.ops")


class ReachedError(Exception):
    """An op was reached with these flat arguments, and shall not run."""


@dataclasses.dataclass
class Pass:
    """The forward or the backward pass of an op.

    Attributes:
        schema: ``"(Tensor x, int k, ...) -> (Tensor, Tensor)"`` in torch.library's language; the last argument, the
            backend's name, is added.
        body: the pass in PyTorch, with the schema's arguments: backend ``reference``.
        outputs: empty outputs for these arguments.
        launch: ``launch(kernel, inputs, outputs)`` calls a backend's kernel.
        supports: by backend, a function of the arguments that gives the reason why it cannot take them, or None.
        mutates: names of arguments that it changes; the schema marks them too.
    """

    schema: str
    body: Callable[..., Outputs]
    outputs: Callable[..., Outputs]
    launch: Callable[[Callable[..., None], tuple[Any, ...], Outputs], None]
    supports: dict[str, Support] = dataclasses.field(default_factory=dict)
    mutates: tuple[str, ...] = ()
    direction: str = "forward"
    registered: Any = None

    def reason_against(self, backend: str, args: tuple[Any, ...]) -> str | None:
        return self.supports[backend](*args) if backend in self.supports else None


@dataclasses.dataclass(frozen=True)
class Gradient:
    """How autograd goes through an op.

    Attributes:
        setup_context: ``(ctx, inputs, output)``, names that torch.library uses, keeps what the backward pass needs.
        backward: ``(ctx, *gradients of the outputs)`` gives one of each flat argument of the schema.
    """

    setup_context: Callable[[Any, tuple[Any, ...], Outputs], None]
    backward: Callable[..., tuple[Tensor | None, ...]]


@dataclasses.dataclass(frozen=True)
class Library:
    """A backend that is somebody else's: a differentiable function of the schema's arguments.

    Attributes:
        call: gives the outputs; those after the first may be missing.
        absence: (reason, remedy) why it cannot run here at all, or None.
        device: the type of device whose tensors it takes; "" is any.
        late: whether ``auto`` tries it after the others here, in spite of its place among them.
    """

    call: Callable[..., Outputs]
    absence: Callable[[], tuple[str, str] | None]
    device: str = "cuda"
    late: Callable[[], bool] = lambda: False


@dataclasses.dataclass
class Op:
    """One declared op; called with the schema's flat arguments, it runs on the backend that is due."""

    name: str
    forward: Pass
    backward: Pass | None
    gradient: Gradient | None
    backends: tuple[str, ...]
    libraries: dict[str, Library]
    timed: bool
    formula: Callable[..., tuple[Tensor | None, ...]] | None = None
    """The gradient's, as autograd calls it."""
    used: str | None = None
    """The backend of the last call, for logs and benchmarks."""
    _auto: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """By type of device, the backends that are there."""

    def __call__(self, *args: Any) -> Outputs:
        if torch.compiler.is_compiling():
            # The request is a constant of both graphs: the backward graph may run in a thread that does not know it.
            return self.forward.registered(*args, asked_for(self.name, self.backends) or "auto")
        if explaining.get():
            raise ReachedError(self, args)
        backend = self.choose(*args)
        if backend in self.libraries:
            return self._call_library(backend, args)
        # The dispatcher takes longer than a small batch's kernel, so a call in which it has no part goes without.
        if dispatched(args):
            return self.forward.registered(*args, backend)
        if _with_gradient(args):
            with_formula = self.gradient is not None
            return _Eager.apply(self, *args, backend) if with_formula else self.forward.registered(*args, backend)
        return self.run(self.forward, *args, backend)

    def differentiate(self, *args: Any, backend: str) -> Outputs:
        """The backward pass, on the backend of the forward pass ("auto" within torch.compile)."""
        assert self.backward is not None
        if torch.compiler.is_compiling() or dispatched(args):
            return self.backward.registered(*args, backend)
        return self.run(self.backward, *args, backend)

    def choose(self, *args: Any, whole: Callable[[], Any] | None = None) -> str:
        """The backend for these arguments of the forward pass; ``whole`` is what a timed op is timed in, if not alone.

        Raises:
            BackendUnavailableError: one was asked for by name and cannot run.
        """
        named = asked_for(self.name, self.backends)
        if named is not None:
            return self.require(named, *args)
        if self.timed:
            chosen = choices.chosen(self.name, form_of(args)) or choices.probe(self, args, whole)
            if chosen and chosen in self.candidates(self.forward, args):  # stored elsewhere, it may be missing here
                return chosen
        return next(self.candidates(self.forward, args))

    def require(self, backend: str, *args: Any) -> str:
        """``backend``, if it can run the forward pass on these arguments. Raises BackendUnavailableError if not."""
        refusal = self.refusal(backend, *args)
        if refusal is not None:
            raise BackendUnavailableError(self.name, backend, *refusal)
        return backend

    def candidates(self, direction: Pass, args: Sequence[Any]) -> Iterator[str]:
        """Backends that can take a call, the one that is tried first first; the last is the reference."""
        on = _device(args).type
        if on not in self._auto:
            here = [name for name in self.backends if self._takes(name) in (on, "") and self.refusal(name) is None]
            self._auto[on] = tuple(sorted(here, key=self.lateness))
        for name in self._auto[on]:
            if direction.reason_against(name, tuple(args)) is None:
                yield name

    def refusal(self, backend: str, *args: Any) -> tuple[str, str] | None:
        """(reason, remedy) why ``backend`` cannot run this call, or without ``args`` any call; None if it can."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} backend", f"take one of {', '.join(self.backends)}"
        missing = self.libraries[backend].absence() if backend in self.libraries else absence(backend)
        if missing is not None or not args or backend == "reference":
            return missing
        on, wants = _device(args).type, self._takes(backend)
        if wants not in (on, ""):
            return f"it takes {wants} tensors, and these are on {on}", f"move them to {wants}, or take another backend"
        reason = self.forward.reason_against(backend, args)
        return None if reason is None else (reason, "take another backend for this call")

    def run(self, direction: Pass, *args: Any) -> Outputs:
        """Run a pass, with the schema's arguments and the backend's name; "auto" is still to be chosen."""
        *inputs, backend = args
        if backend == "auto":
            backend = next(name for name in self.candidates(direction, inputs) if name not in self.libraries)
        try:
            return self._run_on(direction, backend, tuple(inputs))
        except Exception as error:
            self._note_failure(error, direction, backend)
            raise

    def _call_library(self, backend: str, args: tuple[Any, ...]) -> Outputs:
        """As :meth:`run`, on a library."""
        self._note(backend)
        try:
            return self.libraries[backend].call(*args)
        except Exception as error:
            self._note_failure(error, self.forward, backend)
            raise

    def _note_failure(self, error: Exception, direction: Pass, backend: str) -> None:
        """Add to an exception which backend failed, and how to select another one. There is no silent fallback: ranks
        would run different kernels, and a fault of a kernel would show as a slow step."""
        remedy = "" if backend == "reference" else f"; ERD_FAST_BACKEND={self.name}=reference selects PyTorch's"
        error.add_note(f"erd_fast: the {direction.direction} pass of {self.name} failed on backend {backend}{remedy}")

    def _run_on(self, direction: Pass, backend: str, inputs: tuple[Any, ...]) -> Outputs:
        self._note(backend)
        if backend == "reference":
            return direction.body(*inputs)
        outputs = direction.outputs(*inputs)
        device = _device(inputs)
        if backend == "triton" and device.type == "cuda":  # it launches on the current device; csrc has its own guard
            with torch.cuda.device(device):
                direction.launch(self._kernel(backend, direction), inputs, outputs)
        else:
            direction.launch(self._kernel(backend, direction), inputs, outputs)
        return outputs

    def _note(self, backend: str) -> None:
        if backend != self.used:
            self.used = backend
            _log.info("%s runs on %s", self.name, backend)

    def lateness(self, backend: str) -> int:
        """``auto`` tries those with the lowest number first."""
        late = backend in self.libraries and self.libraries[backend].late()
        return 2 if backend == "reference" else int(late)

    def _takes(self, backend: str) -> str:
        """The type of device whose tensors a backend takes; "" is any."""
        if backend in self.libraries:
            return self.libraries[backend].device
        if backend == "reference":
            return ""
        return "cpu" if backend == "cpu" or (backend == "triton" and interpreted()) else "cuda"

    def _kernel(self, backend: str, direction: Pass) -> Callable[..., None]:
        if backend == "triton":
            return getattr(importlib.import_module(f"erd_fast.kernels.{self.name}"), direction.direction)
        return getattr(torch.ops._erd_fast_C, f"{self.name}_{_SUFFIX[direction.direction]}")


_SUFFIX = {"forward": "fwd", "backward": "bwd"}


class _Eager(torch.autograd.Function):
    """Autograd of an op without torch's dispatcher, which takes several times as long."""

    @staticmethod
    def forward(ctx: Any, op: Op, *args: Any) -> Outputs:
        outputs = op.run(op.forward, *args)
        assert op.gradient is not None
        op.gradient.setup_context(ctx, args, outputs)
        ctx.op = op
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.op.formula(ctx, *gradients)


def _refusing_twice(op: Op) -> Callable[..., tuple[Tensor | None, ...]]:
    """The op's formula with the backend's None, and an error where autograd would differentiate it once more: what the
    forward pass saved would count as constant, and the second derivative be wrong silently."""
    gradient, name = op.gradient, op.name
    assert gradient is not None

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{name}: it has no second derivative (create_graph); {name}_reference has every one")
        return *gradient.backward(ctx, *gradients), None

    return backward


def _device(args: Sequence[Any]) -> torch.device:
    return next(arg for arg in args if isinstance(arg, Tensor)).device


def dispatched(args: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher has a part in this call besides autograd: a mode (fake tensors, tracing), a
    subclass."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(isinstance(arg, Tensor) and type(arg) not in (Tensor, Parameter) for arg in args)


def _with_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def declare(
    name: str,
    forward: Pass,
    *,
    backends: tuple[str, ...],
    backward: Pass | None = None,
    gradient: Gradient | None = None,
    libraries: dict[str, Library] | None = None,
    timed: bool = False,
) -> Op:
    """Register ``erd_fast::<name>_fwd``, with a backward pass ``..._bwd`` too, and return the op that calls them.

    Args:
        backends: compiled ones and libraries, in the order in which ``auto`` tries them; the reference comes last.
        gradient: of an op that autograd goes through.
        libraries: backends that are functions of other projects.
        timed: which backend is the fastest depends on the form of the arguments: see :mod:`erd_fast.ops.choices`.
    """
    if name in OPS:
        raise ValueError(f"op {name} is declared twice")
    op = Op(name, forward, backward, gradient, (*backends, "reference"), libraries or {}, timed)
    _register(op, forward)
    if backward is not None:
        backward.direction = "backward"
        _register(op, backward)
    if gradient is not None:
        op.formula = _refusing_twice(op)
        forward.registered.register_autograd(op.formula, setup_context=gradient.setup_context)
    OPS[name] = op
    return op


def _register(op: Op, direction: Pass) -> None:
    full = direction.schema.replace(") ->", ", str backend) ->", 1)

    def run(*args: Any) -> Outputs | None:
        if direction is op.forward and args[-1] != "auto":  # a name that was requested while a graph was traced
            op.require(args[-1], *args[:-1])
        return op.run(direction, *args) or None

    called = f"erd_fast::{op.name}_{_SUFFIX[direction.direction]}"
    direction.registered = torch.library.custom_op(called, run, mutates_args=direction.mutates, schema=full)
    direction.registered.register_fake(lambda *args: direction.outputs(*args[:-1]) or None)


def reference_needed(*tensors: Tensor | None) -> bool:
    """Whether only the differentiable reference is right for this call: within functorch transforms and forward-mode
    differentiation, or where one of ``tensors`` needs a gradient that the op does not give."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
