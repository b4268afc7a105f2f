"""`erd-fast bench ops`: every backend beside eager PyTorch and torch.compile, checked before it is timed."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from erd_fast.benchmark.op_cases import CPU_SIZES, GPU_SIZES, OpCase, op_cases
from erd_fast.benchmark.records import Record
from erd_fast.benchmark.timing import copies_past_l2, measure
from erd_fast.errors import ConfigError, RunError
from erd_fast.ops import BACKENDS, OPS, use_backend

BENCHED = ("draw", "q_sample", "diffusion_loss")


def bench_ops(pattern: str = "", seconds: float = 0.3) -> Iterator[Record]:
    """Records of the cases whose ``op case`` contains ``pattern``, as they are measured.

    Raises:
        ConfigError: no case contains the pattern. RunError: a backend computes something else than eager PyTorch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = False
    for op in BENCHED:
        for size in GPU_SIZES if device.type == "cuda" else CPU_SIZES:
            copies = copies_past_l2(size * 4096 * 8, device)
            for case in op_cases(op, size, device, copies):
                if pattern in f"{case.op} {case.name}":
                    found = True
                    yield from _case_records(case, device, copies, seconds)
    if not found:
        raise ConfigError(
            f"filter: given {pattern!r}, allowed part of a case's name: {', '.join(BENCHED)}, N=64, drawn"
        )


def _case_records(case: OpCase, device: torch.device, copies: int, seconds: float) -> Iterator[Record]:
    compiled = torch.compile(case.eager, dynamic=False)
    for variant, function in (("eager", case.eager), ("compile", compiled)):
        yield _record(case, variant, "", function, device, copies, seconds)
    for backend in BACKENDS:
        if OPS[case.op].refusal(backend) is not None or (backend == "cpu") != (
            device.type == "cpu" and backend == "cpu"
        ):
            continue
        with use_backend(**{case.op: backend}):
            if case.comparable:
                _check(case, backend)
            yield _record(case, "erd-fast", backend, case.ours, device, copies, seconds)


def _record(
    case: OpCase, variant: str, backend: str, function: Any, device: torch.device, copies: int, seconds: float
) -> Record:
    timing = measure([functools.partial(function, copy) for copy in range(copies)], device, seconds=seconds)
    return Record(
        group=f"ops/{case.op}",
        case=case.name,
        variant=variant,
        backend=backend,
        median_s=timing.median_s,
        iqr_s=timing.iqr_s,
        runs=timing.runs,
        gb_per_s=case.bytes_moved / timing.median_s / 1e9,
    )


def _check(case: OpCase, backend: str) -> None:
    """Ours against eager PyTorch: float32 arithmetic in another order, rounded once to the output's dtype."""
    for ours, eager in zip(case.ours(0), case.eager(0), strict=True):
        assert isinstance(ours, Tensor)
        error = float((ours.double() - eager.double()).abs().max())
        size = float(eager.double().abs().max())
        allowed = (torch.finfo(ours.dtype).eps + 16 * torch.finfo(torch.float32).eps) * size
        if not error <= allowed:
            where = f"{case.op} {case.name} on {backend}"
            raise RunError(f"bench: {where} is {error:.3g} away from eager PyTorch, allowed {allowed:.3g}")
