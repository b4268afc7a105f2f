"""`erd-fast bench ops`: every backend beside eager PyTorch and torch.compile, checked before it is timed."""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erd_fast.benchmark.op_cases import ELEMENTS, MODES, OpCase, Tensors, Workload, op_cases
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.timing import Sampler, Timing, captured, interleaved, wall
from erd_fast.errors import ConfigError, RunError
from erd_fast.ops import OPS, use_backend

_COPY_BYTES = 256 << 20  # on a CPU; four times as many on a GPU
_REFERENCE_SIZE = 1024  # the definition takes ten seconds a call on a CPU beyond
_EPS = torch.finfo(torch.float32).eps
_NORMALS = 2e-6  # by which drawn normals may differ between backends


class Variant(NamedTuple):
    """Ours on one backend, or a baseline."""

    name: str
    backend: str = ""


def bench_ops(pattern: str = "", seconds: float = 0.3) -> Iterator[Record]:
    """Records of the cases whose ``group case`` contains ``pattern``, as they are measured; ``N=8`` is not ``N=8192``.

    The bandwidth of a plain copy comes first. What is being measured is said on stderr.

    Raises:
        ConfigError: no case contains the pattern. RunError: a backend computes something else than it should.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.compile(re.escape(pattern) + r"(?!\d)" if pattern else "")
    cases = [case for case in op_cases(device) if found.search(f"{case.group} {case.name}")]
    if not cases:
        raise ConfigError(f"filter: given {pattern!r}, allowed part of a case's name: {', '.join(MODES)}, N=64, drawn")
    _say("machine copy")
    yield _copy(device, seconds)
    for number, case in enumerate(cases, 1):
        _say(f"[{number}/{len(cases)}] {case.group} {case.name}")
        yield from bench_case(case, device, seconds)


def bench_case(case: OpCase, device: torch.device, seconds: float) -> Iterator[Record]:
    """Check all variants of a case, then time them in turn."""
    torch.compiler.reset()  # code that was compiled for eight other sizes would run uncompiled from here on
    workload = case.build(device)
    expected = truth(workload)
    samplers: dict[Variant, Sampler] = {}
    for variant in variants_of(case, device):
        try:
            samplers[variant] = _sampler(case, workload, variant, expected, device)
        except Exception as error:
            if not variant.name.startswith("compile"):
                raise
            _say(f"  {variant.name} does not run here and is left out: {error}")
    for variant, timing in zip(samplers, interleaved(list(samplers.values()), seconds), strict=True):
        yield _record(case.group, case.name, variant, timing, workload.bytes_moved)


def variants_of(case: OpCase, device: torch.device) -> list[Variant]:
    """Baselines, then ours on each backend that is here and runs on ``device``."""
    on_gpu = device.type == "cuda"
    baselines = ["eager", "compile", *(["compile-graphs"] if case.called else [])]
    backends = ["cuda", "triton", "reference"] if on_gpu else ["cpu", "reference"]
    if on_gpu and not case.called:
        backends.remove("reference")  # its order bijection asks the device whether to go on: no CUDA graph
    if not on_gpu and case.size > _REFERENCE_SIZE:
        backends.remove("reference")
    here = [name for name in backends if all(OPS[op].refusal(name) is None for op in case.ops)]
    return [*(Variant(name) for name in baselines), *(Variant("erd-fast", name) for name in here)]


def call_of(workload: Workload, variant: Variant) -> Callable[[int], Tensors]:
    """The calls of a variant, by number of the input copy; ours within ``use_backend(variant.backend)``."""
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if variant.name == "erd-fast":
        return workload.ours
    if variant.name == "eager":
        return workload.baseline(lambda function: function)
    if variant.name == "compile":
        return workload.baseline(functools.partial(torch.compile, **how))
    call = workload.baseline(functools.partial(torch.compile, mode="reduce-overhead", **how))

    def in_new_step(copy: int) -> Tensors:
        torch.compiler.cudagraph_mark_step_begin()  # results of the call before may be overwritten
        return call(copy)

    return in_new_step


def truth(workload: Workload) -> Tensors:
    """What variants are held against: eager PyTorch, or where that draws its own numbers the definition."""
    if workload.as_ours is not None:
        return workload.as_ours(call_of(workload, Variant("eager"))(0))
    with use_backend("reference"):
        return workload.ours(0)


def check(case: OpCase, workload: Workload, variant: Variant, found: Tensors, expected: Tensors) -> None:
    """Raise RunError where a variant that computes the numbers of :func:`truth` found others."""
    drawn = workload.as_ours is None
    if variant.name != "erd-fast":
        if workload.as_ours is None:
            return
        found = workload.as_ours(found)
    for number, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        error, allowed = _error(value, wanted), _allowed(value, wanted, case, drawn=drawn)
        if not error <= allowed:
            where = f"{case.op} {case.name}, {variant.backend or variant.name}"
            raise RunError(f"bench: {where}: result {number} is {error:.3g} off, allowed {allowed:.3g}")


def _error(value: Tensor, wanted: Tensor) -> float:
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        return math.inf
    return float((value.double() - wanted.double()).abs().max())


def _allowed(value: Tensor, wanted: Tensor, case: OpCase, *, drawn: bool) -> float:
    """Nothing for integers. float32 arithmetic in another order, rounded once to the dtype: relative to the largest
    number, 16 roundings, for a mean over n numbers sqrt(n), and two drawn normals with factors of at most 1."""
    if not value.is_floating_point():
        return 0.0
    roundings = math.sqrt(case.size * ELEMENTS) if value.dim() == 0 else 16.0
    relative = torch.finfo(value.dtype).eps + roundings * _EPS + drawn * 2 * _NORMALS
    return relative * float(wanted.double().abs().max())


def _sampler(case: OpCase, workload: Workload, variant: Variant, expected: Tensors, device: torch.device) -> Sampler:
    with use_backend(variant.backend):
        call = call_of(workload, variant)
        check(case, workload, variant, call(0), expected)
        calls = [functools.partial(call, copy) for copy in range(workload.copies)]
        sampler = (captured if device.type == "cuda" and not case.called else wall)(calls)

    def take() -> float:
        with use_backend(variant.backend):
            return sampler.take()

    return Sampler(take, sampler.cost)


def _copy(device: torch.device, seconds: float) -> Record:
    """A copy past all caches: what memory gives, and what the bandwidth of an op is a part of."""
    on_gpu = device.type == "cuda"
    source = torch.rand(_COPY_BYTES * (4 if on_gpu else 1) // 4, device=device)
    target = torch.empty_like(source)
    sampler = (captured if on_gpu else wall)([lambda: target.copy_(source)])
    (timing,) = interleaved([sampler], seconds, least_runs=10)
    return _record("machine", "copy", Variant("eager"), timing, 2 * source.nbytes)


def _record(group: str, case: str, variant: Variant, timing: Timing, bytes_moved: int) -> Record:
    return Record(
        group,
        case,
        variant.name,
        variant.backend,
        **dataclasses.asdict(timing),
        gb_per_s=bytes_moved / timing.median_s / 1e9,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
