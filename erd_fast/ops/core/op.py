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
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from erd_fast.errors import BackendUnavailableError
from erd_fast.ops.availability import Reason
from erd_fast.ops.core.autotune import active_autotuner
from erd_fast.ops.core.backend import Backend, External, Reference
from erd_fast.ops.core.recording import active_recording
from erd_fast.ops.core.selection import OPS, available, check_request, requested, requested_while_tracing, usable

Args = dict[str, Any]
"""The arguments of a pass by name."""
Outputs = Any
"""A NamedTuple of tensors."""
_PLAIN = {Tensor, Parameter, type(None)}


class Pass:
    """The forward or the backward pass of an op.

    Attributes:
        body: the pass in PyTorch; its parameters are the schema, its NamedTuple the outputs (None if it has none).
        empty: the outputs, uninitialised, for the same arguments.
        names, fields: of the arguments, and of the outputs.
        tensors: names of the arguments that are tensors.
        leader: the first of them that is never None; calls run on its device.
        mutates: names of the arguments that it changes.
        op, name, symbol: "<op>", "forward", "<op>_fwd".
    """

    def __init__(self, body: Callable[..., Outputs], empty: Callable[..., Outputs], mutates: Sequence[str] = ()):
        self.body, self.empty, self.mutates = body, empty, mutates
        signature = inspect.signature(body, eval_str=True)
        types = {name: it.annotation for name, it in signature.parameters.items()}
        self.names = tuple(types)
        self.tensors = tuple(name for name, kind in types.items() if kind in (Tensor, Tensor | None))
        self.leader = next(name for name, kind in types.items() if kind is Tensor)
        self.outputs: Callable[..., Outputs] = signature.return_annotation or tuple
        self.fields: tuple[str, ...] = getattr(self.outputs, "_fields", ())
        self.schema = self._schema(types)

    def _schema(self, types: dict[str, Any]) -> str:
        """For torch.library: the parameters without defaults, then the backend's name; plain tuples."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=it) for name, it in (types | {"backend": str}).items()]
        returned = (None, Tensor)[len(self.fields)] if len(self.fields) < 2 else tuple[(Tensor,) * len(self.fields)]  # type: ignore[misc]

        def prototype() -> None: ...

        prototype.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
        return torch.library.infer_schema(prototype, mutates_args=self.mutates)

    def register(self, op: "Op", name: str) -> None:
        """Make this pass ``torch.ops.erd_fast.<op>_fwd`` or ``_bwd``, whose last argument is the backend's name."""
        self.op, self.name, self.symbol = op.name, name, f"{op.name}_{name[0]}wd"

        def run(*values: Any) -> Any:
            args, backend = self.by_name(values), values[-1]
            if name == "forward":
                op.require(backend, args)
                check_request(op.name, backend)
            return self.flat(op.run(self, op.backends[backend], args))

        self.registered = torch.library.custom_op(
            f"erd_fast::{self.symbol}", run, mutates_args=self.mutates, schema=self.schema
        )
        self.registered.register_fake(lambda *values: self.flat(self.empty(**self.by_name(values))))

    def by_name(self, values: Sequence[Any]) -> Args:
        """The arguments of a registered call, whose last is the backend's name."""
        return dict(zip(self.names, values[:-1], strict=True))

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
        gradient: replaces the connection by names. It receives what its parameters name of arguments, outputs and
            gradients of outputs (``dy``), and always ``backend`` and ``needs`` (the arguments that need a gradient),
            and returns gradients by the name of the argument.
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
            through, save = self.gradient.backward_registered, self.gradient.save_registered
            forward.registered.register_autograd(through, setup_context=save)
        self._define_choice()

    def _define_choice(self) -> None:
        """``erd_fast::<name>``, which is decomposed into ``<name>_fwd`` while a graph is traced: the backend is a
        constant of both graphs. Its last argument are the names to choose from, with commas."""

        def choose(*values: Any) -> Any:
            names = values[-1]
            if "," in names:
                found = self.candidates(self.forward.by_name(values))
                names = next(backend.name for backend in found if backend.name in names.split(","))
            return self.forward.registered(*values[:-1], names)

        self._library = torch.library.Library("erd_fast", "FRAGMENT")  # which owns the definition
        self._library.define(self.name + self.forward.schema)
        self._library.impl(self.name, choose, "CompositeImplicitAutograd")
        self._choice = getattr(torch.ops.erd_fast, self.name).default

    def __call__(self, **args: Any) -> Outputs:
        if torch.compiler.is_compiling():
            return self._dispatched(args, tracing=True)
        tensors = [args[name] for name in self.forward.tensors]
        if dispatched(*tensors) or (self.traced is not None and args[self.forward.leader].is_meta):
            return self._dispatched(args, tracing=False)
        return self._run_eager(self.choose(args), args, tensors)

    def differentiate(self, backend: str, **args: Any) -> Outputs:
        """The backward pass, on the backend of the forward pass."""
        assert self.backward is not None
        if torch.compiler.is_compiling() or dispatched(*[args[name] for name in self.backward.tensors]):
            values = [args[name] for name in self.backward.names]
            return self.backward.named(self.backward.registered(*values, backend))
        return self.run(self.backward, self.backends[backend], args)

    def run(self, direction: Pass, backend: Backend, args: Args) -> Outputs:
        """Run one direction on a backend. There is no fallback: ranks would run different kernels, and a fault of a
        kernel would show as a slow step."""
        if (recording := active_recording()) is not None:
            recording.note(self.name, backend.name, args)
            if recording.dry:
                return direction.empty(**args)
        try:
            return backend.run(direction, args[direction.leader].device, args)
        except Exception as error:
            note = f"erd_fast: the {direction.name} pass of {self.name} failed on backend {backend.name}"
            if backend.name != "reference":
                note += f"; ERD_FAST_BACKEND={self.name}=reference selects PyTorch's"
            error.add_note(note)
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
            name = tuner.fastest(self, args, call)
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
        for backend in self.available():
            if backend.why_not(device, args) is None:
                yield backend

    def available(self) -> tuple[Backend, ...]:
        """Backends that this machine has, in the order in which they are tried."""
        if not self._available:
            here = [backend for backend in self.backends.values() if backend.unavailable() is None]
            self._available = tuple(sorted(here, key=lambda backend: backend.priority()))
        return self._available

    def device(self, args: Args) -> torch.device:
        return args[self.forward.leader].device

    def _dispatched(self, args: Args, tracing: bool) -> Outputs:
        """A call in which torch's dispatcher has a part besides autograd, or that torch.compile traces."""
        name = requested_while_tracing(self.name) if tracing else requested(self.name)
        external = self.traced if name is None else self.backends.get(name)
        if isinstance(external, External) and not tracing:
            return self.run(self.forward, external if name is None else self.require(name, args), args)
        if isinstance(external, External) and (name is None or usable(self.name, name)):
            return self.forward.outputs(external.call(**args))
        values = [args[argument] for argument in self.forward.names]
        return self.forward.named(self._choice(*values, name or available(self.name)))

    def _run_eager(self, backend: Backend, args: Args, tensors: list[Tensor | None]) -> Outputs:
        """A call without the dispatcher, which takes longer than a small batch's kernel."""
        if self.gradient is not None and torch.is_grad_enabled() and not isinstance(backend, External):
            for it in tensors:
                if it is not None and it.requires_grad:
                    return self.forward.outputs(*_Eager.apply(self, backend, args, *tensors))
        return self.run(self.forward, backend, args)

    def timed_call(self, args: Args) -> Callable[[Backend], Any]:
        """The forward pass on a backend, and the backward pass where an argument requires a gradient."""
        grad = torch.is_grad_enabled()
        inputs = {
            name: it.detach().requires_grad_(grad and it.requires_grad) if isinstance(it, Tensor) else it
            for name, it in args.items()
        }
        tensors = [inputs[name] for name in self.forward.tensors]
        leaves = [it for it in tensors if it is not None and it.requires_grad]

        def call(backend: Backend) -> None:
            output = self._run_eager(backend, inputs, tensors)[0]
            if leaves:
                torch.autograd.grad(output, leaves, output.detach())

        return call


class _Gradient:
    """How autograd goes through an op: what the forward pass saves, and how the backward pass uses it."""

    def __init__(self, op: Op, function: Callable[..., dict[str, Tensor]] | None):
        self.op, self.function = op, function
        typed = function or op.backward.body  # type: ignore[union-attr]
        parameters = inspect.signature(typed, eval_str=True).parameters
        forward = op.forward
        self.given = {name: it.annotation is Tensor for name, it in parameters.items() if name[1:] in forward.fields}
        """Which parameters are gradients of outputs, and whether each is required."""
        kept = [name for name in parameters if name in (*forward.names, *forward.fields)]
        self.tensors = [name for name in kept if name in (*forward.tensors, *forward.fields)]
        self.others = [name for name in kept if name not in self.tensors]
        self.constant = [name for name in forward.fields if f"d{name}" not in self.given]

    def save(self, ctx: Any, args: Args, outputs: Outputs, backend: str) -> None:
        values = args | dict(zip(self.op.forward.fields, outputs, strict=True))
        ctx.save_for_backward(*[values[name] for name in self.tensors])
        ctx.mark_non_differentiable(*[values[name] for name in self.constant])
        ctx.set_materialize_grads(False)
        ctx.others = {name: values[name] for name in self.others}
        if len(self.given) > 1:  # else the gradient is there whenever the backward pass runs
            ctx.zeros = {name: (values[name[1:]].shape, values[name[1:]].dtype) for name in self.given}
        ctx.backend = backend

    def save_registered(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        forward = self.op.forward
        self.save(ctx, forward.by_name(inputs), forward.named(output), inputs[-1])

    def backward(
        self, ctx: Any, gradients: Sequence[Tensor | None], names: Sequence[str], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the arguments ``names``, of which some are ``needed``. Autograd casts them to their dtypes."""
        op = self.op
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # What the forward pass saved would count as constant, and the second derivative be wrong silently.
            raise RuntimeError(f"{op.name}: double backward (create_graph) is not supported; use {op.name}_reference")
        outputs = {f"d{name}": it for name, it in zip(op.forward.fields, gradients, strict=True)}
        given = {name: outputs[name] for name in self.given}
        device = next((it.device for it in given.values() if it is not None), None)
        if device is None:
            return [None] * len(names)
        for name, required in self.given.items():
            if (it := given[name]) is not None:
                given[name] = it.contiguous()
            elif required:
                shape, dtype = ctx.zeros[name]
                given[name] = torch.zeros(shape, dtype=dtype, device=device)
        named = given | dict(zip(self.tensors, ctx.saved_tensors, strict=True)) | ctx.others
        if self.function is None:
            found = op.differentiate(ctx.backend, **named)
            named = {name[1:]: it for name, it in zip(op.backward.fields, found, strict=True)}  # type: ignore[union-attr]
        else:
            needs = [name for name, need in zip(names, needed, strict=True) if need]
            named = self.function(**named, backend=ctx.backend, needs=needs)
        return [named.get(name) if need else None for name, need in zip(names, needed, strict=True)]

    def backward_registered(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        names = self.op.forward.names
        # From the end: autograd's node of an op may have one more at the beginning.
        needed = ctx.needs_input_grad[-len(names) - 1 : -1]
        return *self.backward(ctx, gradients, names, needed), None


class _Eager(torch.autograd.Function):
    """Autograd of an op without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: Backend, args: Args, *tensors: Tensor | None) -> Any:
        """``tensors`` are those of ``args``, as autograd and tracers see them."""
        args.update(zip(op.forward.tensors, tensors, strict=True))
        outputs = op.run(op.forward, backend, args)
        assert op.gradient is not None
        op.gradient.save(ctx, args, outputs, backend.name)
        ctx.op = op
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        op = ctx.op
        return None, None, None, *op.gradient.backward(ctx, gradients, op.forward.tensors, ctx.needs_input_grad[3:])


def dispatched(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher has a part in a call besides autograd: a mode (fake tensors, tracing), a subclass."""
    return bool(torch._C._len_torch_dispatch_stack()) or not _PLAIN.issuperset(map(type, tensors))


def reference_needed(*tensors: Tensor | None) -> bool:
    """Whether only the differentiable reference is right for this call: within functorch transforms and forward-mode
    differentiation, or where one of ``tensors`` needs a gradient that the op does not give."""
    if tensors and torch.is_grad_enabled() and any(it is not None and it.requires_grad for it in tensors):
        return True
    return _transformed()


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile guards transforms by itself
