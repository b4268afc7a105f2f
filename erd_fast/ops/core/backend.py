"""What an op can run on: PyTorch, our Triton kernels, our compiled kernels, functions of other projects."""

import contextlib
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from erd_fast.ops.availability import Reason, extension_unavailable, interpreted, triton_unavailable

if TYPE_CHECKING:
    from erd_fast.ops.core.op import Args, Outputs, Pass


class Backend:
    """Base of the four kinds of backend.

    Attributes:
        name: as in ``ERD_FAST_BACKEND``.
        device: the type of device whose tensors it takes; "" is any.
    """

    name: str
    device: str

    def __init__(self, name: str, device: str, rule: Callable[..., str | None] | None = None):
        """``rule`` receives the arguments of the forward pass by name, and returns why the backend cannot run them, in
        either direction."""
        self.name, self.device, self.rule = name, device, rule

    def unavailable(self) -> Reason | None:
        """Why no op can run on it on this machine."""
        return None

    def priority(self) -> int:
        """``auto`` tries lower ones first, and equal ones in the order of their declaration."""
        return 0

    def why_not(self, device: torch.device, args: "Args") -> Reason | None:
        """Why it cannot run a call with these arguments, on tensors of ``device``, or its backward pass."""
        if self.device and self.device != device.type:
            return Reason(
                f"it takes {self.device} tensors, and these are on {device.type}",
                f"move them to {self.device}, or take another backend",
            )
        reason = None if self.rule is None else self.rule(**args)
        return None if reason is None else Reason(reason, "take another backend for this call")

    def run(self, direction: "Pass", device: torch.device, args: "Args") -> "Outputs":
        """Run one direction of an op."""
        raise NotImplementedError


class Reference(Backend):
    """PyTorch, on every device."""

    def __init__(self) -> None:
        super().__init__("reference", "")

    def priority(self) -> int:
        return 2

    def run(self, direction: "Pass", device: torch.device, args: "Args") -> "Outputs":
        return direction.body(**args)


class _Kernels(Backend):
    """Kernels of ours: they fill the outputs that :attr:`Pass.empty` allocates, and receive the arguments and outputs
    that they name. An output without elements is passed as None where the kernel's signature allows that."""

    def __init__(self, name: str, device: str, rule: Callable[..., str | None] | None = None):
        super().__init__(name, device, rule)
        self._loaded: dict[str, tuple[Callable[..., None], dict[str, bool]]] = {}

    def run(self, direction: "Pass", device: torch.device, args: "Args") -> "Outputs":
        if direction.symbol not in self._loaded:
            self._loaded[direction.symbol] = self.load(direction)
        kernel, optional = self._loaded[direction.symbol]
        outputs = direction.empty(**args)
        named = args.copy()
        for name, output in zip(direction.fields, outputs, strict=True):
            named[name] = output if output.numel() or not optional[name] else None
        self.launch(kernel, [named[name] for name in optional], device)
        return outputs

    def load(self, direction: "Pass") -> tuple[Callable[..., None], dict[str, bool]]:
        """The kernel, and the names of what it receives with whether each may be None."""
        raise NotImplementedError

    def launch(self, kernel: Callable[..., None], values: list[Any], device: torch.device) -> None:
        kernel(*values)


class Triton(_Kernels):
    """``forward`` and ``backward`` of kernels/<op>.py."""

    def __init__(self, rule: Callable[..., str | None] | None = None):
        super().__init__("triton", "cpu" if interpreted() else "cuda", rule)

    def unavailable(self) -> Reason | None:
        return triton_unavailable()

    def load(self, direction: "Pass") -> tuple[Callable[..., None], dict[str, bool]]:
        kernel = getattr(importlib.import_module(f"erd_fast.kernels.{direction.op}"), direction.name)
        parameters = inspect.signature(kernel, eval_str=True).parameters.values()
        return kernel, {it.name: isinstance(None, it.annotation) for it in parameters}

    def launch(self, kernel: Callable[..., None], values: list[Any], device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel(*values)  # Triton launches on the current device


class Extension(_Kernels):
    """``_erd_fast_C::<op>_fwd`` and ``_bwd`` of csrc/, for ``cuda`` or ``cpu``."""

    def __init__(self, device: str, rule: Callable[..., str | None] | None = None):
        super().__init__(device, device, rule)

    def unavailable(self) -> Reason | None:
        return extension_unavailable(self.name)

    def load(self, direction: "Pass") -> tuple[Callable[..., None], dict[str, bool]]:
        kernel = getattr(torch.ops._erd_fast_C, direction.symbol).default
        return kernel, {it.name: it.type.kind() == "OptionalType" for it in kernel._schema.arguments}


class External(Backend):
    """A differentiable function of another project; its autograd is its own.

    Attributes:
        call: receives the arguments by name and returns the op's first output; the others have defaults.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., torch.Tensor],
        rule: Callable[..., str | None] | None = None,
        unavailable: Callable[[], Reason | None] = lambda: None,
        device: str = "cuda",
        priority: Callable[[], int] = lambda: 0,
    ):
        super().__init__(name, device, rule)
        self.call, self._priority, self._unavailable = call, priority, unavailable

    def unavailable(self) -> Reason | None:
        return self._unavailable()

    def priority(self) -> int:
        return self._priority()

    def run(self, direction: "Pass", device: torch.device, args: "Args") -> "Outputs":
        return direction.outputs(self.call(**args))
