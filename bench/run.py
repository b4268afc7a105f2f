"""Measure on this machine, as make does: ``python bench/run.py ops|attention|step|data``.

Results go to ``bench/results/<machine>/<part>.json``, and a short table comes last. ``python bench/run.py gpu --help``
explains how to measure everything on a GPU within a few minutes.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    sys.exit(
        f"bench/run.py: {sys.executable} has no torch; run it with another Python (make gpu PYTHON=.venv/bin/python)"
    )

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whether the package is installed or not

import gpu

from erd_fast.benchmark import data_report, step_report
from erd_fast.benchmark.data import bench_data
from erd_fast.benchmark.ops import bench
from erd_fast.benchmark.records import Record, collect, machine_name, table
from erd_fast.benchmark.step import bench_step
from erd_fast.files import make_folder

ROOT = Path(__file__).resolve().parents[1]
GPU_SECONDS = 400.0  # after which `make gpu PART=ops` begins no further case; the longest one takes a minute or two
STEP_SECONDS = 390.0  # after which PART=step begins no further variant of a case


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


PARTS: dict[str, Callable[[Path], int]] = {
    "ops": ops,
    "attention": attention,
    "step": step,
    "data": data,
}


def main() -> int:
    if sys.argv[1:2] == ["gpu"]:
        return gpu.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "gpu"])
    part = parser.parse_args().part
    file = make_folder(ROOT / "bench" / "results" / machine_name()) / f"{part}.json"
    status = PARTS[part](file)
    print(f"wrote {file.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
