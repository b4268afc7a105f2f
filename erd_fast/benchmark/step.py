"""`erd-fast bench step`: whole training steps, ours beside those that people write, and ours with pieces switched off.

Every variant has a model, an optimizer and averages of its own. On a GPU variants are made ready as long as they fit
into memory together, and are timed in turn; then they make room for the next ones.
"""

import collections
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch

from erd_fast.benchmark.ops import backends_used, is_absent, leave_out, matching, matmul, rates_of, say
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.step_baselines import Baseline, baselines
from erd_fast.benchmark.step_cases import Problem, StepCase, make_problem, step_cases
from erd_fast.benchmark.step_check import Off, Trainer, check, witness
from erd_fast.benchmark.step_ours import OURS, Ours, ablations
from erd_fast.benchmark.timing import Sampler, Timing, interleaved, wall
from erd_fast.errors import RunError
from erd_fast.models import model_flops
from erd_fast.numerics import is_out_of_memory, set_numerics
from erd_fast.ops import record

SECONDS = 5.0
_MATMUL_SECONDS = 0.3
_SAMPLE_SECONDS = 0.2  # of steps in a row, between which nobody waits for a GPU, as in a run
LEAST_RUNS = 5
_WARM_UP = {"cuda": 5, "cpu": 1}
"""Steps before the one that is checked: that is a replay then, of StepGraph's and of torch.compile's graphs."""

Late = Callable[[str], bool]
"""Whether it is too late to begin this; says so."""


class Facts(NamedTuple):
    """What is known of a variant before it is timed, and stays known when it has made room."""

    ran: str
    peak_bytes: int | None
    batch: int
    flops: int


class _Ready(NamedTuple):
    """A variant that trains, and computes the right numbers."""

    trainer: Trainer
    facts: Facts
    off: Off


def bench_step(pattern: str = "", seconds: float = SECONDS, limit: float | None = None) -> Iterator[Record]:
    """Records of the cases whose ``group case`` contains ``pattern``, as they are measured, ``seconds`` for each
    variant. Without a pattern, of the usual cases. A large product comes first.

    What is being measured is said on stderr. Once ``limit`` seconds have passed no variant is begun, and those left out
    are named.

    Raises:
        ConfigError: no case contains the pattern. RunError: a variant of ours computes something else than it should.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = matching(pattern, step_cases(device))
    say("machine matmul")
    yield matmul(device, _MATMUL_SECONDS)

    def late(what: str) -> bool:
        if limit is None or time.perf_counter() - began <= limit:
            return False
        say(f"{what}: left out, {limit:.0f} seconds have passed")
        return True

    for number, case in enumerate(chosen, 1):
        name = f"[{number}/{len(chosen)}] {case.group} {case.name}"
        if not late(name):
            say(name)
            yield from bench_case(case, device, seconds, late)


def bench_case(
    case: StepCase, device: torch.device, seconds: float, late: Late = lambda what: False
) -> Iterator[Record]:
    """Check and time every variant of a case. What does not run here is named and left out, and so is a baseline that
    computes something else; ours that does ends the run."""
    measure = _at_largest_batch if case.largest else _at_one_batch
    make_room()
    yield from measure(case, make_problem(case, device), seconds, late)


def variants_of(case: StepCase, device: torch.device) -> list[str]:
    """Ours, the baselines, ours with pieces switched off."""
    return [OURS, *baselines(device), *(() if case.largest else ablations(device))]


def make_trainer(problem: Problem, name: str) -> Trainer:
    """The variant called ``name``, at its start."""
    train, recipes = problem.config.train, baselines(problem.device)
    set_numerics(train.precision, problem.device, deterministic=train.deterministic)
    return Baseline(problem, recipes[name]) if name in recipes else Ours(problem, name)


def _at_one_batch(case: StepCase, problem: Problem, seconds: float, late: Late) -> Iterator[Record]:
    waiting = collections.deque(variants_of(case, problem.device))
    ready: dict[str, _Ready] = {}
    while waiting:
        name = waiting[0]
        if late(f"  {name}") or _settled(case, problem, name, ready):
            waiting.popleft()
            continue
        yield from _timed(case, problem, ready, seconds)
        ready.clear()
        make_room()
    yield from _timed(case, problem, ready, seconds)


def _settled(case: StepCase, problem: Problem, name: str, ready: dict[str, _Ready]) -> bool:
    """True: the variant is ready beside the others, or cannot be. False: it wants the room that they take."""
    if ready and not _room_beside(ready):
        return False
    outcome = _join(case, problem, name, ready)
    if outcome != "ready":
        ready.pop(name, None)
        _give_back()
    return outcome != "crowded"


def _join(
    case: StepCase, problem: Problem, name: str, ready: dict[str, _Ready]
) -> Literal["ready", "crowded", "absent"]:
    alone = not ready
    try:
        trainer, facts = begin(problem, name)
        ready[name] = _Ready(trainer, facts, check(problem, witness(trainer), _where(case, name)))
        return "ready" if alone or _undisturbed(ready) else "crowded"
    except Exception as error:
        if not alone and is_out_of_memory(error):
            return "crowded"
        if not _may_fail(problem, name, error):
            raise
        leave_out(name, error)
        return "absent"


def _room_beside(ready: dict[str, _Ready]) -> bool:
    """Whether it is worth a try: what the smallest of them took is free."""
    if not torch.cuda.is_available():
        return True
    _give_back()
    return torch.cuda.mem_get_info()[0] >= min(found.facts.peak_bytes or 0 for found in ready.values())


def _undisturbed(ready: dict[str, _Ready]) -> bool:
    """Whether all take their steps without the allocator having to give memory back, which would be timed too."""
    if not torch.cuda.is_available():
        return True
    retries = 0
    for _ in range(2):
        before = torch.cuda.memory_stats()["num_alloc_retries"]
        for found in ready.values():
            found.trainer.step()
        retries = torch.cuda.memory_stats()["num_alloc_retries"] - before
    return retries == 0


def _timed(case: StepCase, problem: Problem, ready: dict[str, _Ready], seconds: float) -> Iterator[Record]:
    if not ready:
        return
    timings = interleaved([sampler_of(found.trainer) for found in ready.values()], seconds, LEAST_RUNS)
    for (name, found), timing in zip(ready.items(), timings, strict=True):
        yield record_of(case, name, found.facts, found.off, timing, problem.device)


def _at_largest_batch(case: StepCase, problem: Problem, seconds: float, late: Late) -> Iterator[Record]:
    for name in variants_of(case, problem.device):
        if late(f"  {name}"):
            continue
        record = _alone(case, problem, name, seconds)
        make_room()
        if record is not None:
            yield record


def _alone(case: StepCase, problem: Problem, name: str, seconds: float) -> Record | None:
    """One variant at its largest batch. What it computed is checked when it has made room."""
    try:
        size = largest_batch(lambda size: _fits(problem.sized(size), name), case.size)
        if size == 0:
            raise torch.OutOfMemoryError("out of memory with one image")
        sized = problem.sized(size)
        trainer, facts = begin(sized, name)
        evidence = witness(trainer)
        (timing,) = interleaved([sampler_of(trainer)], seconds, LEAST_RUNS)
        del trainer
        make_room()
        off = check(sized, evidence, f"{_where(case, name)} at N={size}")
    except Exception as error:
        if not _may_fail(problem, name, error):
            raise
        leave_out(name, error)
        return None
    return dataclasses.replace(record_of(case, name, facts, off, timing, problem.device), batch=size)


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest that ``fits`` of ``start`` and its doubles, or its halves if it does not fit itself; 0 for none."""
    size = start
    while size and not fits(size):
        size //= 2
    while size >= start and fits(2 * size):
        size *= 2
    return size


def _fits(problem: Problem, name: str) -> bool:
    try:
        begin(problem, name)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        make_room()


def begin(problem: Problem, name: str) -> tuple[Trainer, Facts]:
    """The variant called ``name`` after its first steps, and what is known of it."""
    on_gpu, batch = problem.device.type == "cuda", problem.config.train.batch_size
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with record() as recording:
        trainer = make_trainer(problem, name)
        for _ in range(_WARM_UP[problem.device.type]):
            trainer.step()
    if isinstance(trainer, Ours) and not trainer.is_as_named:
        raise RunError(f"bench: {name}: the step was not captured as a CUDA graph, see the warning")
    peak_bytes = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return trainer, Facts(backends_used(recording), peak_bytes, batch, 3 * batch * model_flops(trainer.model))


def sampler_of(trainer: Trainer) -> Sampler:
    """Consecutive steps without synchronisation between them."""
    return wall([trainer.step], _SAMPLE_SECONDS)


def _may_fail(problem: Problem, name: str, error: Exception) -> bool:
    """Ours may not, but for what is not here or does not fit."""
    return is_absent(error) or name in baselines(problem.device)


def make_room() -> None:
    """Where nothing is held, drop compiled code and its graphs too."""
    torch.compiler.reset()
    _give_back()


def _give_back() -> None:
    gc.collect()  # models and what keeps their gradients refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _where(case: StepCase, name: str) -> str:
    return f"{case.group} {case.name}, {name}"


def record_of(case: StepCase, name: str, facts: Facts, off: Off | None, timing: Timing, device: torch.device) -> Record:
    """``off``: what :func:`check` found, if it was checked."""
    return Record(
        case.group,
        case.name,
        name,
        facts.ran,
        **dataclasses.asdict(timing),
        **rates_of(timing, facts.flops, device),
        images_per_sec=facts.batch / timing.median_s,
        loss_off=off.loss if off else None,
        gradient_off=off.gradient if off else None,
        peak_bytes=facts.peak_bytes,
    )
