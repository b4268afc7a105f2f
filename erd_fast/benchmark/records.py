"""Results as JSON with the machine they were measured on, and as a table."""

import dataclasses
import datetime
import platform
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
    """What is measured: ``ops/q_sample``."""
    case: str
    """On which input: ``draw N=64``."""
    variant: str
    """``erd-fast``, or the baseline: ``eager``, ``compile``."""
    backend: str
    """Which backend of ours ran; empty for a baseline."""
    median_s: float
    iqr_s: float
    runs: int
    gb_per_s: float
    """Bytes that the op must move over the median."""


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "erd_fast": erd_fast.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_records(path: Path, records: Iterable[Record]) -> None:
    """``{"machine": {...}, "records": [...]}``."""
    make_folder(path.parent)
    write_json(path, {"machine": machine(), "records": [dataclasses.asdict(record) for record in records]})


def table(records: Iterable[Record]) -> str:
    """A line for each record, with the speed over the eager baseline of its group and case."""
    found = list(records)
    eager = {(record.group, record.case): record.median_s for record in found if record.variant == "eager"}
    lines = [
        f"{'group':<20}{'case':<24}{'variant':<12}{'backend':<11}{'median':>12}{'iqr':>10}{'GB/s':>9}{'x eager':>9}"
    ]
    for record in found:
        base = eager.get((record.group, record.case))
        speed = f"{base / record.median_s:.2f}" if base else ""
        lines.append(
            f"{record.group:<20}{record.case:<24}{record.variant:<12}{record.backend:<11}"
            f"{record.median_s * 1e6:>9.1f} us{record.iqr_s * 1e6:>7.1f} us{record.gb_per_s:>9.2f}{speed:>9}"
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
