"""What a benchmark's case is: calls of ours and of baselines on the same inputs, and what their results must be."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch._functorch.config
from torch import Tensor

from erd_fast.ops import use_backend

EPS = torch.finfo(torch.float32).eps

Tensors = tuple[Tensor, ...]
Call = Callable[[int], Tensors]
"""Takes the number of an input copy."""
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Variant(NamedTuple):
    """Ours on one backend, or a baseline."""

    name: str
    backend: str = ""
    """Of ours; empty where every op takes its own choice."""

    @property
    def ours(self) -> bool:
        return self.name == "erd-fast"

    def __str__(self) -> str:
        return self.backend or self.name


class Deviation(NamedTuple):
    """How far a result is off, and may be."""

    what: str
    error: float
    allowed: float


class Case(Protocol):
    """What is measured on which input. It weighs nothing until it is built."""

    @property
    def group(self) -> str:
        """``ops/q_sample``."""

    @property
    def name(self) -> str:
        """``drawn N=64``."""

    @property
    def called(self) -> bool:
        """On a GPU: timed as called from Python, launches and all; otherwise its kernels alone."""

    @property
    def usual(self) -> bool:
        """Measured where no filter names it too."""

    @property
    def multiplies(self) -> bool:
        """It has matrix products."""

    @property
    def ops(self) -> tuple[str, ...]:
        """Ops that it runs."""

    def baselines(self, device: torch.device) -> tuple[str, ...]:
        """Names of what ours is compared with."""

    def backends(self, device: torch.device) -> tuple[str, ...]:
        """Backends that ours is timed on where they are; "" is every op's own choice."""

    def build(self, device: torch.device) -> "Workload":
        """Make the inputs."""


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the gradients of a call are taken of, by copy: its inputs, given the gradients of its outputs."""

    inputs: Sequence[Tensors]
    gradients: Sequence[Tensors]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A case's inputs and what runs on them."""

    copies: int
    ours: Call
    baseline: Callable[[Wrap], Call]
    """What people write; each part that they would compile goes through the argument: nothing, or torch.compile."""
    compare: Callable[[Tensors, Tensors, bool], Iterator[Deviation]]
    """``(found, expected, ours)``."""
    others: dict[str, Call] = dataclasses.field(default_factory=dict)
    """Further baselines, by name."""
    truth: Callable[[], Tensors] | None = None
    """What copy 0 must give; None is what the baseline gives, or where that draws numbers of its own the definition."""
    as_ours: Callable[[Tensors], Tensors] | None = lambda found: found
    """Puts the baselines' results into the layout of ours; None where they draw numbers of their own."""
    backward: Backward | None = None
    """The gradients are timed in place of the calls."""
    bytes_moved: int | None = None
    """Bytes that must be read and written."""
    flops: int | None = None
    """Of matrix products, 2 a multiply-add, without what is computed again."""
    images: int | None = None
    """Of a model, whose results are its loss and its gradients."""
    limit: float | None = None
    """Of calls that are timed for their overhead, on one thread: the most that ours may take, relative to the first
    baseline."""


@contextlib.contextmanager
def running(workload: Workload, variant: Variant) -> Iterator[None]:
    """What a variant is compiled and called in: its backend; and for gradients of a graph that is kept no donated
    buffers, which a compiled backward pass may overwrite and which would end with its first run. Calls timed for their
    overhead run on one thread and as users make them, outside any block of use_backend."""
    if workload.limit is not None:
        with _one_thread():
            yield
        return
    donated = torch._functorch.config.donated_buffer and workload.backward is None
    with use_backend(variant.backend), torch._functorch.config.patch(donated_buffer=donated):
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def call_of(workload: Workload, variant: Variant) -> Call:
    """The calls of a variant, for within :func:`running`."""
    call = _forward_of(workload, variant)
    return call if workload.backward is None else _gradients_of(call, workload.backward)


def _forward_of(workload: Workload, variant: Variant) -> Call:
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if variant.ours:
        return workload.ours
    if variant.name in workload.others:
        return workload.others[variant.name]
    if variant.name == "eager":
        return workload.baseline(lambda function: function)
    if variant.name == "compile":
        return workload.baseline(functools.partial(torch.compile, **how))
    call = workload.baseline(functools.partial(torch.compile, mode="reduce-overhead", **how))

    def in_new_step(copy: int) -> Tensors:
        torch.compiler.cudagraph_mark_step_begin()  # results of the call before may be overwritten
        return call(copy)

    return in_new_step


def _gradients_of(call: Call, backward: Backward) -> Call:
    """The gradients of all inputs, given those of the outputs, without the forward pass: a copy's first call makes its
    graph, which is kept.

    Autograd runs a backward pass on the stream of its forward pass, and a capture takes in its own stream alone: each
    stream has graphs of its own.
    """
    graphs: dict[tuple[int, int], Tensors] = {}

    def differentiate(copy: int) -> Tensors:
        stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
        if (copy, stream) not in graphs:
            graphs[copy, stream] = call(copy)
        given = graphs[copy, stream], backward.inputs[copy], backward.gradients[copy]
        return torch.autograd.grad(*given, retain_graph=True)

    return differentiate


def elementwise(
    found: Tensors,
    expected: Tensors,
    ours: bool,
    *,
    terms: Callable[[Tensor], int],
    relative: Callable[[bool], float] = lambda ours: 0.0,
) -> Iterator[Deviation]:
    """Nothing for integers. float32 arithmetic in another order, rounded once to the dtype: relative to the largest
    number, 16 roundings, or sqrt(n) where a number is the sum of ``terms`` = n others; and ``relative`` of (is it ours)
    for what was rounded before."""
    for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        allowed = 0.0
        if wanted.is_floating_point():
            roundings = max(16.0, math.sqrt(terms(wanted)))
            allowed = torch.finfo(wanted.dtype).eps + roundings * EPS + relative(ours)
            allowed *= float(wanted.detach().double().abs().max())
        yield Deviation(f"result {number}", _error(value, wanted), allowed)


def _error(value: Tensor, wanted: Tensor) -> float:
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        return math.inf
    return float((value.detach().double() - wanted.detach().double()).abs().max())
