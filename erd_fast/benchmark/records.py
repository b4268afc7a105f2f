"""Results as JSON with the machine they were measured on, and as a table."""

import dataclasses
import datetime
import math
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import erd_fast
from erd_fast.files import make_folder, write_json


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement. A ratio is two records of one group and case."""

    group: str
    """What is measured: ``ops/q_sample``; ``machine`` is what this machine can do at all."""
    case: str
    """On which input: ``drawn N=64``."""
    variant: str
    """``erd-fast``, or the baseline: ``eager``, ``compile``, ``compile-graphs``."""
    backend: str
    """Which backend of ours ran; empty for a baseline."""
    median_s: float
    iqr_s: float
    runs: int
    gb_per_s: float
    """Bytes that the op must move over the median."""


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cuda, commit = torch.cuda.is_available(), _git("rev-parse", "HEAD")
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "erd_fast": erd_fast.__version__,
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain")) if commit else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_records(path: Path, records: Iterable[Record]) -> None:
    """``{"machine": {...}, "records": [...]}``."""
    make_folder(path.parent)
    write_json(path, {"machine": machine(), "records": [dataclasses.asdict(record) for record in records]})


def machine_name() -> str:
    """Name of this machine as a folder has it: ``nvidia-h100-80gb-hbm3``, ``amd-epyc-2-threads``."""
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()} {threads}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(records: Iterable[Record]) -> str:
    """A line for each record, with its part of a copy's bandwidth and its speed over eager PyTorch."""
    found = list(records)
    copy = next((record.gb_per_s for record in found if record.group == "machine"), math.nan)
    eager = {(record.group, record.case): record.median_s for record in found if record.variant == "eager"}
    head = f"{'group':<20}{'case':<14}{'variant':<16}{'backend':<11}{'median':>13}{'iqr':>12}{'runs':>6}"
    lines = [f"{head}{'GB/s':>9}{'of copy':>9}{'x eager':>9}"]
    for record in found:
        base = eager.get((record.group, record.case), math.nan)
        lines.append(
            f"{record.group:<20}{record.case:<14}{record.variant:<16}{record.backend:<11}"
            f"{record.median_s * 1e6:>10.1f} us{record.iqr_s * 1e6:>9.1f} us{record.runs:>6}"
            f"{record.gb_per_s:>9.2f}{record.gb_per_s / copy:>9.1%}{base / record.median_s:>9.2f}"
        )
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _git(*arguments: str) -> str:
    root = Path(erd_fast.__file__).resolve().parent.parent
    return _output("git", "-C", str(root), *arguments)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
