"""Declaring an op: its definition, its outputs, its backends; and running it on one of them.

::

    op = declare("q_sample", SCHEMA, body=_body, outputs=_outputs, backends=("cuda", "triton", "cpu"))
    x_t, target = op(latents, ...)

makes ``torch.ops.erd_fast.q_sample_fwd``, whose flat arguments are the schema's and the backend's name. ``outputs``
gives empty tensors of the right form: it is the fake of torch.compile, and allocates what a kernel fills. The kernels
of an op take the same flat arguments on every backend and return nothing; ``launch`` says which.
"""

import contextvars
import dataclasses
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from erd_fast.errors import BackendUnavailableError, ConfigError, unknown_name
from erd_fast.ops.backends import BACKENDS, OPS, absence, asked_for, interpreted

Outputs = tuple[Tensor, ...]
Support = Callable[..., str | None]
_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("erd_fast_explaining", default=False)
_log = logging.getLogger("erd_fast.ops")


class _ReachedError(Exception):
    """An op was reached with these flat arguments, and shall not run."""


@dataclasses.dataclass
class Op:
    """One declared op; called with the schema's flat arguments, it runs on the backend that is due."""

    name: str
    body: Callable[..., Outputs]
    outputs: Callable[..., Outputs]
    launch: Callable[[Callable[..., None], tuple[Any, ...], Outputs], None]
    backends: tuple[str, ...]
    supports: dict[str, Support]
    registered: Any = None
    used: str | None = None
    """The backend of the last call, for logs and benchmarks."""
    _auto: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """By type of device, the backends that are there."""

    def __call__(self, *args: Any) -> Outputs:
        if torch.compiler.is_compiling():  # there is nothing to choose yet: the op chooses when the graph runs
            return self.registered(*args, "")
        if _explaining.get():
            raise _ReachedError(self, args)
        backend = self.choose(*args)
        # The dispatcher takes longer than a small batch's kernel, so a call in which it has no part goes without.
        return self.registered(*args, backend) if _dispatched(args) else self.run(*args, backend)

    def choose(self, *args: Any) -> str:
        """The backend for these arguments.

        Raises:
            BackendUnavailableError: one was asked for by name and cannot run.
        """
        named = asked_for(self.name, self.backends)
        if named is not None:
            refusal = self.refusal(named, *args)
            if refusal is not None:
                raise BackendUnavailableError(self.name, named, *refusal)
            return named
        on = _device_type(args)
        if on not in self._auto:
            self._auto[on] = tuple(name for name in BACKENDS if _takes(name) in (on, "") and self.refusal(name) is None)
        return next(name for name in self._auto[on] if self.supports[name](*args) is None)

    def refusal(self, backend: str, *args: Any) -> tuple[str, str] | None:
        """(reason, remedy) why ``backend`` cannot run this call, or without ``args`` any call; None if it can."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} backend", f"take one of {', '.join(self.backends)}"
        missing = absence(backend)
        if missing is not None or not args or backend == "reference":
            return missing
        on, wants = _device_type(args), _takes(backend)
        if on != wants:
            return f"it takes {wants} tensors, and these are on {on}", f"move them to {wants}, or take another backend"
        reason = self.supports[backend](*args)
        return None if reason is None else (reason, "take another backend for this call")

    def run(self, *args: Any) -> Outputs:
        """The registered op: the schema's arguments and the backend's name ("" is still to be chosen)."""
        *inputs, backend = args
        backend = backend or self.choose(*inputs)
        if backend != self.used:
            self.used = backend
            _log.info("%s runs on %s", self.name, backend)
        if backend == "reference":
            return self.body(*inputs)
        outputs = self.outputs(*inputs)
        if backend == "triton" and outputs[0].is_cuda:  # it launches on the current device; csrc has a guard of its own
            with torch.cuda.device(outputs[0].device):
                self.launch(self._kernel(backend), tuple(inputs), outputs)
        else:
            self.launch(self._kernel(backend), tuple(inputs), outputs)
        return outputs

    def _kernel(self, backend: str) -> Callable[..., None]:
        if backend == "triton":
            return importlib.import_module(f"erd_fast.kernels.{self.name}").forward
        return getattr(torch.ops._erd_fast_C, f"{self.name}_fwd")


def _everything(*args: Any) -> str | None:
    """The reason why a backend without limits cannot take these arguments: there is none."""
    return None


def _device_type(args: tuple[Any, ...]) -> str:
    return next(arg for arg in args if isinstance(arg, Tensor)).device.type


def _takes(backend: str) -> str:
    """The type of device whose tensors a backend takes; "" is any."""
    if backend == "reference":
        return ""
    return "cpu" if backend == "cpu" or (backend == "triton" and interpreted()) else "cuda"


def _dispatched(args: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher has a part in this call: autograd, a mode (fake tensors, tracing), a subclass."""
    if torch._C._len_torch_dispatch_stack():
        return True
    with_grad = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, Tensor) and (type(arg) not in (Tensor, Parameter) or (with_grad and arg.requires_grad)):
            return True
    return False


def declare(
    name: str,
    schema: str,
    *,
    body: Callable[..., Outputs],
    outputs: Callable[..., Outputs],
    launch: Callable[[Callable[..., None], tuple[Any, ...], Outputs], None],
    backends: tuple[str, ...],
    supports: dict[str, Support] | None = None,
) -> Op:
    """Register ``erd_fast::<name>_fwd`` and return the op that calls it.

    Args:
        schema: ``"(Tensor x, int k, ...) -> (Tensor, Tensor)"`` in torch.library's language; the last argument, the
            backend's name, is added.
        body: the op in PyTorch, with the schema's arguments: backend ``reference``.
        outputs: empty outputs for these arguments.
        launch: ``launch(kernel, inputs, outputs)`` calls a backend's kernel.
        backends: compiled ones it has, of cuda, triton, cpu.
        supports: by backend, a function of the arguments that gives the reason why it cannot take them, or None.
    """
    if name in OPS:
        raise ValueError(f"op {name} is declared twice")
    supporting = dict.fromkeys(BACKENDS, _everything) | (supports or {})
    op = Op(name, body, outputs, launch, (*backends, "reference"), supporting)
    full = schema.replace(") ->", ", str backend) ->", 1)
    op.registered = torch.library.custom_op(f"erd_fast::{name}_fwd", op.run, mutates_args=(), schema=full)
    op.registered.register_fake(lambda *args: outputs(*args[:-1]))
    OPS[name] = op
    return op


def reference_needed(*tensors: Tensor | None) -> bool:
    """Whether only the differentiable reference is right for this call: within functorch transforms and forward-mode
    differentiation, or where one of ``tensors`` needs a gradient that the op does not give."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def explain(op: str, *args: Any, **how: Any) -> str:
    """Which backend ``op`` takes, and why not the others: for a call with these arguments, or without any in general.

    Raises:
        ConfigError: unknown op. ValueError: arguments that the op does not allow.
    """
    if op not in OPS:
        raise ConfigError(unknown_name("op", op, OPS))
    declared, flat = OPS[op], ()
    if args or how:
        token = _explaining.set(True)
        try:
            getattr(importlib.import_module("erd_fast.ops"), op)(*args, **how)
        except _ReachedError as asked:
            flat = asked.args[1]
        else:
            return f"{op} takes its differentiable reference: the call is within a transform, or needs a gradient"
        finally:
            _explaining.reset(token)
    refusals = {backend: declared.refusal(backend, *flat) for backend in BACKENDS}
    named = asked_for(op, declared.backends)
    chosen = named or next(backend for backend, refusal in refusals.items() if refusal is None)
    lines = [f"{op} takes {chosen}, {'asked for by name' if named else 'the first that can run'}"]
    for backend, refusal in refusals.items():
        lines.append(f"  {backend}: {'can run' if refusal is None else '; '.join(refusal)}")
    return "\n".join(lines)
