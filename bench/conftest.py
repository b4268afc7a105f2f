"""What the files of bench/ share: sizes, variants, and the check before each timing.

pytest-benchmark times one variant after another, and on a GPU launches too: look here at one op while you work on it.
``erd-fast bench ops`` times variants in turn and kernels alone.
"""

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch

from erd_fast.benchmark.op_cases import MODES, SHAPE, SIZES, OpCase
from erd_fast.benchmark.ops import Variant, call_of, check, truth, variants_of
from erd_fast.benchmark.records import machine
from erd_fast.ops import use_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All sizes, variants and modes; nothing large or compiled where pytest-benchmark only tries them out."""
    trying = metafunc.config.getoption("benchmark_disable") or hasattr(metafunc.config, "workerinput")
    op = metafunc.module.__name__.rpartition("bench_")[2]
    pairs = [(variant, size) for size in SIZES for variant in variants_of(OpCase(op, "", size), DEVICE)]
    if trying:
        pairs = [(variant, size) for variant, size in pairs if size == SIZES[0] and variant.name != "compile"]
    metafunc.parametrize(
        ("variant", "size"), pairs, ids=["-".join((*filter(None, v), f"N={size}")) for v, size in pairs]
    )
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES[op])


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info |= machine()


@pytest.fixture
def timed(benchmark) -> Callable[..., None]:
    """``timed(op, variant, size, mode)``: check the variant, then time it."""

    def run(op: str, variant: Variant, size: int, mode: str = "") -> None:
        torch.compiler.reset()
        case = OpCase(op, mode, size)
        workload = case.build(DEVICE)
        call, copies = call_of(workload, variant), itertools.cycle(range(workload.copies))
        with use_backend(variant.backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch.compile says of its own parts is no failure here
            expected = truth(workload)
            check(case, workload, variant, call(0), expected)
            benchmark(lambda: call(next(copies)))
        moved, dtypes = workload.bytes_moved, [str(value.dtype) for value in expected]
        benchmark.extra_info |= {"shape": [size, *SHAPE], "dtype": dtypes, "bytes": moved}
        if benchmark.enabled:
            benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9

    return run
