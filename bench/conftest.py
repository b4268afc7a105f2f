"""What the files of bench/ share: cases, variants, and the check before each timing.

pytest-benchmark times one variant after another, and on a GPU launches too: look here at one op while you work on it.
``erd-fast bench ops`` times variants in turn and kernels alone.
"""

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch

from erd_fast.benchmark.ops import cases, check, truth, variants_of
from erd_fast.benchmark.records import machine
from erd_fast.benchmark.workload import Case, Variant, call_of, running
from erd_fast.errors import BackendUnavailableError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All cases of the file's op, and all variants; nothing large or compiled where pytest-benchmark only tries them
    out."""
    op = metafunc.module.__name__.rpartition("bench_")[2]
    mine = [case for case in cases("ops", DEVICE) if case.group == f"ops/{op}"]
    trying = metafunc.config.getoption("benchmark_disable") or hasattr(metafunc.config, "workerinput")
    if trying:
        mine = _smallest(mine)
    pairs = [(case, variant) for case in mine for variant in variants_of(case, DEVICE)]
    if trying:
        pairs = [(case, variant) for case, variant in pairs if variant.name != "compile"]
    ids = ["-".join(filter(None, (*variant, case.name))) for case, variant in pairs]
    metafunc.parametrize(("case", "variant"), pairs, ids=ids)


def _smallest(found: list[Case]) -> list[Case]:
    """The first case of each mode: sizes ascend."""
    return list({case.mode: case for case in reversed(found)}.values())


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info |= machine()


@pytest.fixture
def timed(benchmark) -> Callable[..., None]:
    """``timed(case, variant)``: check the variant, then time it beside the case's others."""

    def run(case: Case, variant: Variant) -> None:
        torch.compiler.reset()
        benchmark.group = f"{case.group} {case.name}"
        workload = case.build(DEVICE)
        call, copies = call_of(workload, variant), itertools.cycle(range(workload.copies))
        expected = truth(workload)
        with running(workload, variant), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch.compile says of its own parts is no failure here
            try:
                found = call(0)
            except BackendUnavailableError as error:
                pytest.skip(str(error))
            check(case, workload, variant, found, expected)
            benchmark(lambda: call(next(copies)))
        moved = workload.bytes_moved
        shapes = [[str(value.dtype), *value.shape] for value in expected]
        benchmark.extra_info |= {"results": shapes, "bytes": moved, "flops": workload.flops}
        if benchmark.enabled and moved is not None:
            benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9

    return run
