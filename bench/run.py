"""Measure or test on this machine, as make does: ``python bench/run.py ops|attention|step|data|tests``.

Results go to ``bench/results/<machine>/<part>.json``, and a short table comes last.
"""

import argparse
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from erd_fast.benchmark import data_report, step_report
from erd_fast.benchmark.data import bench_data
from erd_fast.benchmark.ops import bench
from erd_fast.benchmark.records import Record, collect, machine, machine_name, table
from erd_fast.benchmark.step import bench_step
from erd_fast.files import make_folder, write_json

ROOT = Path(__file__).resolve().parents[1]
TESTED = (
    "tests/ops",
    "tests/csrc",
    "tests/kernels",
    "tests/data/test_gpu.py",
    "tests/models/test_gpu.py",
    "tests/training/test_gpu.py",
    "tests/benchmark/test_gpu.py",
)
"""What has code of a GPU to run."""
GPU_SECONDS = 400.0  # after which `make gpu PART=ops` begins no further case; the longest one takes a minute or two
STEP_SECONDS = 390.0  # after which PART=step begins no further variant of a case
COUNTED = ("passed", "failed", "skipped")


def ops(file: Path) -> int:
    """`erd-fast bench ops`."""
    return _measured(file, bench("ops", limit=GPU_SECONDS if torch.cuda.is_available() else None))


def attention(file: Path) -> int:
    """`erd-fast bench attention`."""
    return _measured(file, bench("attention", limit=GPU_SECONDS if torch.cuda.is_available() else None))


def step(file: Path) -> int:
    """`erd-fast bench step`."""
    measuring = bench_step(limit=STEP_SECONDS if torch.cuda.is_available() else None)
    return _measured(file, measuring, step_report.table)


def data(file: Path) -> int:
    """`erd-fast bench data`."""
    return _measured(file, bench_data(), data_report.table)


def _measured(file: Path, measuring: Iterable[Record], written: Callable[[list[Record]], str] = table) -> int:
    print(written(collect(measuring, file)))
    return 0


def tests(file: Path) -> int:
    """The tests of ops and kernels; several at a time where pytest-xdist is."""
    outcomes, facts = Outcomes(), machine()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    workers = ["--numprocesses", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    how = ["--quiet", "--continue-on-collection-errors", *workers]
    status = pytest.main([*(str(ROOT / folder) for folder in TESTED), *how], plugins=[outcomes])
    areas = [{"area": area, **counts} for area, counts in sorted(outcomes.areas.items())]
    write_json(file, {"machine": facts, "tests": areas, "failed": outcomes.failed})
    print(f"{'':<16}" + "".join(f"{name:>8}" for name in COUNTED) + f"{'seconds':>9}")
    for area, counts in sorted(outcomes.areas.items()):
        print(f"{area:<16}" + "".join(f"{counts[name]:>8}" for name in COUNTED) + f"{counts['seconds']:>9.1f}")
    return int(status)


class Outcomes:
    """Counts of tests by folder, as a plugin of pytest."""

    def __init__(self) -> None:
        self.areas: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys((*COUNTED, "seconds"), 0))
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        counts = self.areas["/".join(Path(report.nodeid.partition("::")[0]).parts[:2])]
        counts["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


PARTS: dict[str, Callable[[Path], int]] = {
    "ops": ops,
    "attention": attention,
    "step": step,
    "data": data,
    "tests": tests,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    part = parser.parse_args().part
    file = make_folder(ROOT / "bench" / "results" / machine_name()) / f"{part}.json"
    status = PARTS[part](file)
    print(f"wrote {file.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
