"""Declaring an op from typed functions, and running it.

::

    def _forward(x: Tensor, scale: Tensor | None, k: int) -> Scaled: ...  # the backend "reference"
    def _empty(x: Tensor, **_: Any) -> Scaled: ...  # what kernels fill, and the fake

    _op = Op("scaled", Pass(_forward, _empty), backends=(Extension("cuda"), Triton(), Extension("cpu")))
    y = _op(x=x, scale=scale, k=3).y

The parameters of ``_forward`` are the schema of ``erd_fast::scaled_fwd``, the fields of its NamedTuple are the outputs,
and kernels receive both by name. A backward pass is declared in the same way and connected by names: ``dy`` is the
gradient of output ``y``, and its own output ``dx`` that of input ``x``.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from erd_fast.errors import BackendUnavailableError
from erd_fast.ops.availability import Reason
from erd_fast.ops.core.autotune import active_autotuner
from erd_fast.ops.core.backend import Backend, External, Reference
from erd_fast.ops.core.recording import active_recording
from erd_fast.ops.core.selection import OPS, available, requested, requested_while_tracing

Args = dict[str, Any]
"""The arguments of a pass by name."""
Outputs = Any
"""A NamedTuple of tensors."""
_SUFFIX = {"forward": "fwd", "backward": "bwd"}


class Pass:
    """The forward or the backward pass of an op.

    Attributes:
        body: the pass in PyTorch; its parameters are the schema, its NamedTuple the outputs (None if it has none).
        empty: the outputs, uninitialised, for the same arguments.
        names, fields: of the arguments, and of the outputs.
        mutates: names of the arguments that it changes.
    """

    def __init__(self, body: Callable[..., Outputs], empty: Callable[..., Outputs], mutates: Sequence[str] = ()):
        self.body, self.empty, self.mutates = body, empty, mutates
        self.signature = inspect.signature(body, eval_str=True)
        self.names = tuple(self.signature.parameters)
        self.tensors = frozenset(
            name for name, it in self.signature.parameters.items() if it.annotation in (Tensor, Tensor | None)
        )
        self.leader = next(name for name, it in self.signature.parameters.items() if it.annotation is Tensor)
        returned = self.signature.return_annotation
        self.outputs: Callable[..., Outputs] = returned or tuple
        self.fields: tuple[str, ...] = getattr(returned, "_fields", ())

    def register(self, op: "Op", direction: str) -> None:
        """Make this pass ``torch.ops.erd_fast.<op>_fwd`` or ``_bwd``, whose last argument is the backend's name."""
        self.op, self.name = op.name, direction

        def run(*values: Any) -> Any:
            *inputs, backend = values
            args = dict(zip(self.names, inputs, strict=True))
            known = op.require(backend, args) if direction == "forward" else op.backends[backend]
            return self.flat(op.run(self, known, args))

        run.__signature__ = self.schema()  # type: ignore[attr-defined]
        name = f"erd_fast::{op.name}_{_SUFFIX[direction]}"
        self.registered = torch.library.custom_op(name, run, mutates_args=self.mutates)
        self.registered.register_fake(
            lambda *values: self.flat(self.empty(**dict(zip(self.names, values[:-1], strict=True))))
        )

    def schema(self) -> inspect.Signature:
        """For torch.library: positional parameters without defaults, then the backend's name; plain tuples."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [it.replace(kind=kind, default=it.empty) for it in self.signature.parameters.values()]
        parameters.append(inspect.Parameter("backend", kind, annotation=str))
        returned = (None, Tensor)[len(self.fields)] if len(self.fields) < 2 else tuple[(Tensor,) * len(self.fields)]  # type: ignore[misc]
        return inspect.Signature(parameters, return_annotation=returned)

    def dispatch(self, args: Args, backend: str) -> Outputs:
        """Run through torch's dispatcher."""
        return self.named(self.registered(*[args[name] for name in self.names], backend))

    def flat(self, outputs: Outputs) -> Any:
        """As torch.library has them: None, a tensor or a tuple of several."""
        return tuple(outputs) if len(self.fields) > 1 else outputs[0] if self.fields else None

    def named(self, outputs: Any) -> Outputs:
        """The inverse of :meth:`flat`."""
        return self.outputs(*outputs) if len(self.fields) > 1 else self.outputs(outputs) if self.fields else ()


class Op:
    """A declared op. Called with the arguments of its forward pass by name, it runs on the backend that is due.

    Args:
        backends: in the order in which ``auto`` tries them; the reference is added as the last.
        backward: the backward pass; without it, and without ``gradient``, the op has no gradient.
        gradient: replaces the connection by names. It receives what its parameters name of arguments, outputs,
            gradients of outputs (``dy``), ``backend``, and ``needs`` (the arguments that need a gradient), and returns
            gradients by the name of the argument.
        timed: the fastest backend depends on the arguments: see :class:`~erd_fast.ops.core.autotune.Autotuner`.
        traced: PyTorch's function, which runs instead within torch.compile, on the meta device and under dispatch
            modes, unless a backend is requested.
    """

    def __init__(
        self,
        name: str,
        forward: Pass,
        *,
        backends: Sequence[Backend],
        backward: Pass | None = None,
        gradient: Callable[..., dict[str, Tensor]] | None = None,
        timed: bool = False,
        traced: External | None = None,
    ):
        if name in OPS:
            raise ValueError(f"op {name} is declared twice")
        self.name, self.forward, self.backward, self.timed, self.traced = name, forward, backward, timed, traced
        self.backends: dict[str, Backend] = {backend.name: backend for backend in (*backends, Reference())}
        self._available: tuple[Backend, ...] = ()
        OPS[name] = self
        forward.register(self, "forward")
        if backward is not None:
            backward.register(self, "backward")
        self.gradient = _Gradient(self, gradient) if gradient or backward else None
        if self.gradient is not None:
            forward.registered.register_autograd(self.gradient.backward, setup_context=self.gradient.save_registered)
        self._define_choice()

    def _define_choice(self) -> None:
        """``erd_fast::<name>``, which is decomposed into ``<name>_fwd`` while a graph is traced: the backend is a
        constant of both graphs. Its last argument are the names to choose from, with commas."""

        def choose(*values: Any) -> Any:
            *inputs, names = values
            if "," in names:
                args = dict(zip(self.forward.names, inputs, strict=True))
                names = next(backend.name for backend in self.candidates(args) if backend.name in names.split(","))
            return self.forward.registered(*inputs, names)

        choose.__signature__ = self.forward.schema()  # type: ignore[attr-defined]
        self._library = torch.library.Library("erd_fast", "FRAGMENT")  # which owns the definition
        self._library.define(self.name + torch.library.infer_schema(choose, mutates_args=self.forward.mutates))
        self._library.impl(self.name, choose, "CompositeImplicitAutograd")
        self._choice = getattr(torch.ops.erd_fast, self.name).default

    def __call__(self, **args: Any) -> Outputs:
        if torch.compiler.is_compiling():
            return self._traced(args)
        plain, needs_gradient = _kinds(args)
        if not plain or (self.traced is not None and args[self.forward.leader].is_meta):
            return self._dispatched(args)
        return self._run_eager(self.choose(args), args, needs_gradient)

    def differentiate(self, backend: str, **args: Any) -> Outputs:
        """The backward pass, on the backend of the forward pass."""
        assert self.backward is not None
        if torch.compiler.is_compiling() or not _kinds(args)[0]:
            return self.backward.dispatch(args, backend)
        return self.run(self.backward, self.backends[backend], args)

    def run(self, direction: Pass, backend: Backend, args: Args) -> Outputs:
        """Run one direction on a backend. There is no fallback: ranks would run different kernels, and a fault of a
        kernel would show as a slow step."""
        recording = active_recording()
        if recording is not None:
            recording.note(self.name, backend.name, args)
            if recording.dry:
                return direction.empty(**args)
        try:
            return backend.run(direction, args[direction.leader].device, args)
        except Exception as error:
            remedy = (
                "" if backend.name == "reference" else f"; ERD_FAST_BACKEND={self.name}=reference selects PyTorch's"
            )
            error.add_note(
                f"erd_fast: the {direction.name} pass of {self.name} failed on backend {backend.name}{remedy}"
            )
            raise

    def choose(self, args: Args, call: Callable[[Backend], Any] | None = None) -> Backend:
        """The backend for these arguments; ``call`` is what is timed instead of the op, where the op is a part of it.

        Raises:
            BackendUnavailableError: the requested backend cannot run it.
        """
        name = requested(self.name)
        if name is not None:
            return self.require(name, args)
        tuner = active_autotuner() if self.timed else None
        if tuner is not None:
            name = tuner.find(self, args) or tuner.time(self, args, call or self._timed_call(args))
            if name is not None and self.why_not(name, args) is None:  # stored elsewhere, it may be missing here
                return self.backends[name]
        return next(self.candidates(args))

    def require(self, name: str, args: Args) -> Backend:
        """The named backend. Raises BackendUnavailableError if it cannot run these arguments."""
        reason = self.why_not(name, args)
        if reason is not None:
            raise BackendUnavailableError(self.name, name, *reason)
        return self.backends[name]

    def why_not(self, name: str, args: Args | None = None) -> Reason | None:
        """Why the named backend cannot run these arguments, or without them any."""
        if name not in self.backends:
            return Reason(f"{self.name} has no {name} backend", f"take one of {', '.join(self.backends)}")
        reason = self.backends[name].unavailable()
        return reason or (None if args is None else self.backends[name].why_not(self.device(args), args))

    def candidates(self, args: Args) -> Iterator[Backend]:
        """Backends that can run these arguments, in the order in which they are tried; the last is the reference."""
        device = self.device(args)
        return (backend for backend in self.available() if backend.why_not(device, args) is None)

    def available(self) -> tuple[Backend, ...]:
        """Backends that this machine has, in the order in which they are tried."""
        if not self._available:
            here = [backend for backend in self.backends.values() if backend.unavailable() is None]
            here.sort(
                key=lambda backend: (backend.name == "reference", isinstance(backend, External) and backend.late())
            )
            self._available = tuple(here)
        return self._available

    def device(self, args: Args) -> torch.device:
        return args[self.forward.leader].device

    def _traced(self, args: Args) -> Outputs:
        """A call that torch.compile traces."""
        name = requested_while_tracing(self.name)
        external = self.traced if name is None else self.backends.get(name)
        if isinstance(external, External):
            return self.forward.outputs(external.call(**args), *[None] * (len(self.forward.fields) - 1))
        values = [args[argument] for argument in self.forward.names]
        return self.forward.named(self._choice(*values, name or available(self.name)))

    def _dispatched(self, args: Args) -> Outputs:
        """A call in which torch's dispatcher has a part besides autograd."""
        by_request = self.traced is None or requested(self.name) is not None
        backend = self.choose(args) if by_request else cast(Backend, self.traced)
        if isinstance(backend, External):
            return self.run(self.forward, backend, args)
        return self.forward.dispatch(args, backend.name)

    def _run_eager(self, backend: Backend, args: Args, needs_gradient: bool) -> Outputs:
        """A call without the dispatcher, which takes longer than a small batch's kernel."""
        if needs_gradient and self.gradient is not None and not isinstance(backend, External):
            values = [args[name] for name in self.forward.names]
            return self.forward.outputs(*_Eager.apply(self, *values, backend.name))
        return self.run(self.forward, backend, args)

    def _timed_call(self, args: Args) -> Callable[[Backend], Any]:
        """The forward pass on a backend, and the backward pass where an argument requires a gradient."""
        grad = torch.is_grad_enabled()
        inputs = {
            name: it.detach().requires_grad_(grad and it.requires_grad) if isinstance(it, Tensor) else it
            for name, it in args.items()
        }
        leaves = [it for it in inputs.values() if isinstance(it, Tensor) and it.requires_grad]

        def call(backend: Backend) -> None:
            output = self._run_eager(backend, inputs, bool(leaves))[0]
            if leaves:
                torch.autograd.grad(output, leaves, output.detach())

        return call


class _Gradient:
    """How autograd goes through an op: what the forward pass saves, and how the backward pass uses it."""

    def __init__(self, op: Op, function: Callable[..., dict[str, Tensor]] | None):
        self.op, self.function = op, function
        typed = function if op.backward is None or function is not None else op.backward.body
        assert typed is not None
        parameters = inspect.signature(typed, eval_str=True).parameters
        forward = op.forward
        self.given = {name: it.annotation is Tensor for name, it in parameters.items() if name[1:] in forward.fields}
        """Which parameters are gradients of outputs, and whether each is required."""
        kept = [name for name in parameters if name in (*forward.names, *forward.fields)]
        self.tensors = [name for name in kept if name in (*forward.tensors, *forward.fields)]
        self.others = [name for name in kept if name not in self.tensors]
        self.also = [name for name in ("backend", "needs") if name in parameters]

    def save_registered(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *values, backend = inputs
        forward = self.op.forward
        self.save(ctx, dict(zip(forward.names, values, strict=True)), forward.named(output), backend)

    def save(self, ctx: Any, args: Args, outputs: Outputs, backend: str) -> None:
        forward = self.op.forward
        values = args | dict(zip(forward.fields, outputs, strict=True))
        ctx.save_for_backward(*[values[name] for name in self.tensors])
        ctx.mark_non_differentiable(*[values[name] for name in forward.fields if f"d{name}" not in self.given])
        ctx.set_materialize_grads(False)
        ctx.others = {name: values[name] for name in self.others}
        ctx.dtypes = {name: args[name].dtype for name in forward.tensors if args[name] is not None}
        ctx.zeros = {name: (values[name[1:]].shape, values[name[1:]].dtype) for name in self.given}
        ctx.backend = backend

    def backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        op, names = self.op, self.op.forward.names
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # What the forward pass saved would count as constant, and the second derivative be wrong silently.
            raise RuntimeError(f"{op.name}: double backward (create_graph) is not supported; use {op.name}_reference")
        outputs = {f"d{name}": it for name, it in zip(op.forward.fields, gradients, strict=True)}
        given = {name: outputs[name] for name in self.given}
        device = next((it.device for it in given.values() if it is not None), None)
        if device is None:
            return (None,) * (len(names) + 1)
        saved = dict(zip(self.tensors, ctx.saved_tensors, strict=True))
        for name, required in self.given.items():
            if (it := given[name]) is not None:
                given[name] = it.contiguous()
            elif required:
                shape, dtype = ctx.zeros[name]
                given[name] = torch.zeros(shape, dtype=dtype, device=device)
        found = self._call(ctx, given | saved | ctx.others)
        dtypes = ctx.dtypes
        return *(found[it].to(dtypes[it]) if it in found and it in dtypes else None for it in names), None

    def _call(self, ctx: Any, named: Args) -> dict[str, Tensor]:
        """Gradients by the name of the argument."""
        if self.function is None:
            assert self.op.backward is not None
            outputs = self.op.differentiate(ctx.backend, **named)
            return {name[1:]: it for name, it in zip(self.op.backward.fields, outputs, strict=True)}
        names = self.op.forward.names
        # From the end: autograd's node of an op may have one more at the beginning.
        needed = ctx.needs_input_grad[-len(names) - 1 : -1]
        needs = [name for name, need in zip(names, needed, strict=True) if need]
        also = {"backend": ctx.backend, "needs": needs}
        return self.function(**named, **{name: also[name] for name in self.also})


class _Eager(torch.autograd.Function):
    """Autograd of an op without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, op: Op, *values: Any) -> Any:
        *inputs, backend = values
        args = dict(zip(op.forward.names, inputs, strict=True))
        outputs = op.run(op.forward, op.backends[backend], args)
        assert op.gradient is not None
        op.gradient.save(ctx, args, outputs, backend)
        ctx.op = op
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.op.gradient.backward(ctx, *gradients)


def _kinds(args: Args) -> tuple[bool, bool]:
    """Whether the dispatcher has no part in a call besides autograd, and whether autograd has one."""
    plain, needs_gradient = not torch._C._len_torch_dispatch_stack(), False
    for it in args.values():
        if isinstance(it, Tensor):
            plain = plain and (type(it) is Tensor or type(it) is Parameter)
            needs_gradient = needs_gradient or it.requires_grad
    return plain, needs_gradient and torch.is_grad_enabled()


def dispatched(*tensors: Tensor) -> bool:
    """Whether torch's dispatcher has a part in a call besides autograd: a mode (fake tensors, tracing), a subclass."""
    return bool(torch._C._len_torch_dispatch_stack()) or any(type(it) not in (Tensor, Parameter) for it in tensors)


def reference_needed(*tensors: Tensor | None) -> bool:
    """Whether only the differentiable reference is right for this call: within functorch transforms and forward-mode
    differentiation, or where one of ``tensors`` needs a gradient that the op does not give."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
