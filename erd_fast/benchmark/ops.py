"""`erd-fast bench ops` and `bench attention`: every backend beside eager PyTorch and torch.compile, checked before it
is timed."""

import collections
import contextlib
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from erd_fast.benchmark.attention import attention_cases
from erd_fast.benchmark.block_cases import block_cases
from erd_fast.benchmark.call_cases import call_cases
from erd_fast.benchmark.model_cases import model_cases
from erd_fast.benchmark.op_cases import op_cases
from erd_fast.benchmark.optimizer_cases import optimizer_cases
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.timing import Sampler, Timing, captured, interleaved, wall
from erd_fast.benchmark.workload import Case, Deviation, Tensors, Variant, Workload, call_of, running
from erd_fast.errors import BackendUnavailableError, ConfigError, RunError
from erd_fast.numerics import is_out_of_memory
from erd_fast.ops import OPS, Autotuner, Recording, autotune, record, use_backend
from erd_fast.ops.core.backend import External
from erd_fast.training.metrics import peak_tflops

SECONDS = 0.3
_COPY_BYTES = 256 << 20  # on a CPU; four times as many on a GPU
_CALLS_SECONDS = 20e-3
"""Of a sample of calls that are timed for their overhead: thousands of calls."""
_MATRIX = 1024  # on a CPU; eight times as many rows on a GPU


def cases(what: str, device: torch.device) -> list[Case]:
    """Every case that can be measured on ``device``, in the order in which they are: of ``ops`` or ``attention``."""
    if what == "attention":
        return [*attention_cases(device)]
    return [
        *op_cases(device),
        *optimizer_cases(device),
        *block_cases(device),
        *model_cases(device),
        *call_cases(device),
    ]


def bench(what: str, pattern: str = "", seconds: float = SECONDS, limit: float | None = None) -> Iterator[Record]:
    """Records of the cases of ``what`` whose ``group case`` contains ``pattern``, as they are measured; ``N=8`` is not
    ``N=8192``. Without a pattern, of the usual cases.

    What the machine can do comes first: the bandwidth of a plain copy and, where a case has matrix products, a large
    one. What is being measured is said on stderr. Once ``limit`` seconds have passed no case is begun, and those left
    out are named.

    Raises:
        ConfigError: no case contains the pattern. RunError: a backend computes something else than it should.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = matching(pattern, cases(what, device))
    say("machine copy")
    yield copy(device, seconds)
    if any(case.multiplies for case in chosen):
        say("machine matmul")
        yield matmul(device, seconds)
    for number, case in enumerate(chosen, 1):
        name = f"[{number}/{len(chosen)}] {case.group} {case.name}"
        if limit is not None and time.perf_counter() - began > limit:
            say(f"{name}: left out, {limit:.0f} seconds have passed")
            continue
        say(name)
        yield from bench_case(case, device, seconds)


Failed = Callable[[Variant, Exception], None]


class Named(Protocol):
    """What a filter chooses by."""

    @property
    def group(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def usual(self) -> bool: ...


C = TypeVar("C", bound=Named)


def matching(pattern: str, every: Sequence[C]) -> list[C]:
    """The cases whose ``group case`` contains ``pattern``, or the usual ones. Raises ConfigError if there is none."""
    found = re.compile(re.escape(pattern) + r"(?!\d)")
    chosen = [case for case in every if (found.search(f"{case.group} {case.name}") if pattern else case.usual)]
    if not chosen:
        groups = ", ".join(dict.fromkeys(case.group for case in every))
        raise ConfigError(f"filter: given {pattern!r}, allowed part of a case's name: {groups}, {every[0].name}")
    return chosen


class _Prepared(NamedTuple):
    """A variant that computes the right numbers."""

    sampler: Sampler
    ran: str
    peak_bytes: int | None
    errors: list[float]


def bench_case(
    case: Case,
    device: torch.device,
    seconds: float,
    *,
    compiled: bool = True,
    without: Collection[str] = (),
    failed: Failed | None = None,
) -> Iterator[Record]:
    """Check all variants of a case, then time them in turn. What does not run here is named and left out, and so is a
    baseline or another project's backend that gives something else; ours that does ends the run.

    Args:
        compiled: with the baselines that torch.compile makes.
        without: variants that are left out, by their text.
        failed: called with every variant that fails, and why; nothing ends the run then.
    """
    torch.compiler.reset()  # code that was compiled for eight other sizes would run uncompiled from here on
    try:
        workload = case.build(device)
        expected = truth(workload)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        leave_out(f"{case.group} {case.name}", error)
        return
    prepared: dict[Variant, _Prepared] = {}
    for variant in variants_of(case, device):
        if str(variant) in without or (variant.name.startswith("compile") and not compiled):
            continue
        try:
            prepared[variant] = _prepare(case, workload, variant, expected, device)
        except Exception as error:
            if failed is not None:
                failed(variant, error)
                continue
            others = any(isinstance(OPS[op].backends.get(variant.backend), External) for op in case.ops)
            if variant.ours and not others and not is_absent(error):
                raise
            leave_out(str(variant), error)
    del expected
    timings = interleaved([found.sampler for found in prepared.values()], seconds) if prepared else []
    timed = dict(zip(prepared, timings, strict=True))
    base = None if workload.limit is None else timed.get(Variant(case.baselines(device)[0]))
    for variant, timing in timed.items():
        record = _record(case, variant.name, prepared[variant], timing, workload, device)
        if variant.ours and base is not None:
            record = dataclasses.replace(record, ratio=timing.median_s / base.median_s, limit=workload.limit)
        yield record


def leave_out(what: str, error: Exception) -> None:
    """Say so."""
    say(f"  {what} does not run here and is left out: {error}")
    if is_out_of_memory(error):
        torch.cuda.empty_cache()


def is_absent(error: Exception) -> bool:
    """Whether a variant is not installed here or does not fit into memory; any other error of ours ends the run."""
    return isinstance(error, BackendUnavailableError) or is_out_of_memory(error)


def variants_of(case: Case, device: torch.device) -> list[Variant]:
    """Baselines, then ours on each backend that is here."""
    here = [name for name in case.backends(device) if not name or all(OPS[op].why_not(name) is None for op in case.ops)]
    return [*map(Variant, case.baselines(device)), *(Variant("erd-fast", name) for name in here)]


def truth(workload: Workload) -> Tensors:
    """What variants are held against: the workload's own, eager PyTorch, or where that draws its own numbers the
    definition."""
    if workload.truth is not None:
        return workload.truth()
    if workload.as_ours is not None:
        return workload.as_ours(call_of(workload, Variant("eager"))(0))
    with use_backend("reference"):
        return workload.ours(0)


def check(case: Case, workload: Workload, variant: Variant, found: Tensors, expected: Tensors) -> list[Deviation]:
    """Raise RunError where a variant that computes the numbers of :func:`truth` found others; how far it is off."""
    if not variant.ours:
        if workload.as_ours is None:
            return []
        found = workload.as_ours(found)
    deviations = list(workload.compare(found, expected, variant.ours))
    refuse_off(f"{case.group} {case.name}, {variant}", deviations)
    return deviations


def refuse_off(where: str, deviations: Iterable[Deviation]) -> None:
    """Raise RunError for the first result that is off by more than it may be."""
    for what, error, allowed in deviations:
        if not error <= allowed:
            raise RunError(f"bench: {where}: {what} is {error:.3g} off, allowed {allowed:.3g}")


def _prepare(case: Case, workload: Workload, variant: Variant, expected: Tensors, device: torch.device) -> _Prepared:
    tuner = Autotuner(timing=variant.ours and not variant.backend)
    with running(workload, variant):
        call = call_of(workload, variant)
        with autotune(tuner), record() as recording:
            deviations = check(case, workload, variant, call(0), expected)
        tuner.timing = False
        ran = variant.backend or (backends_used(recording) if variant.ours else "")
        peak_bytes = _peak_bytes(lambda: call(0)) if device.type == "cuda" else None
        calls = [functools.partial(call, copy) for copy in range(workload.copies)]
        if workload.limit is not None:
            sampler = wall(calls, _CALLS_SECONDS)
        else:
            sampler = (captured if device.type == "cuda" and not case.called else wall)(calls)

    def take() -> float:
        chosen = autotune(tuner) if workload.limit is None else contextlib.nullcontext()
        with running(workload, variant), chosen:
            return sampler.take()

    return _Prepared(Sampler(take, sampler.cost), ran, peak_bytes, [deviation.error for deviation in deviations])


def backends_used(recording: Recording) -> str:
    """Which backends ran last, in the form that ``use_backend`` takes: ``triton,attention=cudnn``."""
    used = {op: recording.backends[op][-1] for op in OPS if op in recording.backends}
    if not used:
        return ""
    most = collections.Counter(used.values()).most_common(1)[0][0]
    return ",".join([most, *(f"{op}={backend}" for op, backend in used.items() if backend != most)])


def _peak_bytes(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy(device: torch.device, seconds: float) -> Record:
    """A copy past all caches: what memory gives, and what the bandwidth of an op is a part of."""
    on_gpu = device.type == "cuda"
    source = torch.rand(_COPY_BYTES * (4 if on_gpu else 1) // 4, device=device)
    target = torch.empty_like(source)
    sampler = (captured if on_gpu else wall)([lambda: target.copy_(source)])
    (timing,) = interleaved([sampler], seconds, least_runs=10)
    rate = 2 * source.nbytes / timing.median_s / 1e9
    return Record("machine", "copy", "eager", "", **dataclasses.asdict(timing), gb_per_s=rate)


def matmul(device: torch.device, seconds: float) -> Record:
    """A large square product, bfloat16 on a GPU: what matrix units give, and what the FLOP/s of an op are a part of."""
    on_gpu = device.type == "cuda"
    side, dtype = _MATRIX * (8 if on_gpu else 1), torch.bfloat16 if on_gpu else torch.float32
    first, second = torch.randn(2, side, side, device=device, dtype=dtype)
    sampler = (captured if on_gpu else wall)([lambda: first @ second])
    (timing,) = interleaved([sampler], seconds, least_runs=10)
    rates = rates_of(timing, 2 * side**3, device)
    return Record("machine", "matmul", "eager", "", **dataclasses.asdict(timing), **rates)


def rates_of(timing: Timing, flops: int | None, device: torch.device) -> dict[str, Any]:
    """``tflops``, and ``mfu`` where the GPU's peak is known."""
    if flops is None:
        return {}
    tflops = flops / timing.median_s / 1e12
    peak = peak_tflops(device) if device.type == "cuda" else None
    return {"tflops": tflops} if peak is None else {"tflops": tflops, "mfu": tflops / peak}


def _record(
    case: Case, variant: str, prepared: _Prepared, timing: Timing, workload: Workload, device: torch.device
) -> Record:
    moved, images, errors = workload.bytes_moved, workload.images, prepared.errors
    off: dict[str, Any] = {} if images is None else {"loss_off": errors[0], "gradient_off": max(errors[1:])}
    return Record(
        case.group,
        case.name,
        variant,
        prepared.ran,
        **dataclasses.asdict(timing),
        **rates_of(timing, workload.flops, device),
        **off,
        gb_per_s=None if moved is None else moved / timing.median_s / 1e9,
        images_per_sec=None if images is None else images / timing.median_s,
        peak_bytes=prepared.peak_bytes,
    )


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the table."""
    print(line, file=sys.stderr, flush=True)
