"""Results as JSON with the machine they were measured on, and as a table."""

import dataclasses
import datetime
import math
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
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
    gb_per_s: float | None = None
    """Bytes that the op must move over the median."""
    tflops: float | None = None
    """FLOPs of matrix products, without those that are computed again, over the median."""
    mfu: float | None = None
    """That over what the datasheet promises."""
    images_per_sec: float | None = None
    loss_off: float | None = None
    """Of a model: relative difference of its loss from plain PyTorch in float32."""
    gradient_off: float | None = None
    """The same of that parameter's gradient which is off most, by norm."""
    peak_bytes: int | None = None
    """Most memory of the GPU that a call takes beside what was there before: inputs, parameters, and for a backward
    pass alone what its forward pass kept."""
    batch: int | None = None
    """Images of a step, where every variant takes as many as it can."""
    latents_per_sec: float | None = None
    cpu_ms_per_1k: float | None = None
    """Milliseconds of CPU, on all cores and in all processes, that reading 1000 latents takes."""
    processes: int | None = None
    """That read, beside the one that is timed."""
    wait_pct: float | None = None
    """Part of a training step's time that it waits for its batch."""
    growth_bytes: int | None = None
    """Anonymous memory that was taken and not given back."""
    ratio: float | None = None
    """Of calls timed for their overhead: ours over the baseline."""
    limit: float | None = None
    """The most that the ratio should be."""


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cuda, (commit, dirty) = torch.cuda.is_available(), checkout_commit()
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
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_records(path: Path, records: Iterable[Record], facts: dict[str, Any] | None = None) -> None:
    """``{"machine": {...}, "records": [...]}``, a record with the numbers that apply to it; ``facts`` are those of
    :func:`machine` if they are there already."""
    make_folder(path.parent)
    given = [{name: value for name, value in dataclasses.asdict(r).items() if value is not None} for r in records]
    write_json(path, {"machine": facts or machine(), "records": given})


def collect(measuring: Iterable[Record], file: Path | None) -> list[Record]:
    """All of them, written to ``file`` as they come: what is stopped half-way keeps what it has."""
    facts, found = machine(), []
    for record in measuring:
        found.append(record)
        if file is not None:
            write_records(file, found, facts)
    return found


def machine_name() -> str:
    """Name of this machine as a folder has it: ``nvidia-h100-80gb-hbm3``, ``amd-epyc-2-threads``."""
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu_name()} {threads}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(records: Iterable[Record]) -> str:
    """A line for each record, with its part of a copy's bandwidth and its speed over eager PyTorch."""
    found = list(records)
    copy = next((record.gb_per_s for record in found if record.group == "machine"), None)
    eager = {(record.group, record.case): record.median_s for record in found if record.variant == "eager"}
    head = ["group", "case", "variant", "backend", "median", "iqr", "runs", "GB/s", "of copy", "x eager"]
    more = [name for name in _MORE if any(getattr(record, name) is not None for record in found)]
    lines = [[*head[:-1], *(_MORE[name][0] for name in more), head[-1]]]
    for record in found:
        base = eager.get((record.group, record.case), math.nan)
        times = [f"{record.median_s * 1e6:.1f} us", f"{record.iqr_s * 1e6:.1f} us", str(record.runs)]
        rate = "" if record.gb_per_s is None else f"{record.gb_per_s:.2f}"
        part = "" if record.gb_per_s is None or copy is None else f"{record.gb_per_s / copy:.1%}"
        rest = ["" if getattr(record, name) is None else _MORE[name][1](getattr(record, name)) for name in more]
        names = [record.group, record.case, record.variant, record.backend]
        speed = "" if math.isnan(base) else f"{base / record.median_s:.2f}"
        lines.append([*names, *times, rate, part, *rest, speed])
    return aligned(lines, names=4)


_MORE: dict[str, tuple[str, Callable[[float], str]]] = {
    "tflops": ("TFLOP/s", "{:.3g}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "images_per_sec": ("images/s", "{:.1f}".format),
    "gradient_off": ("gradient off", "{:.1e}".format),
    "peak_bytes": ("peak GiB", lambda count: f"{count / 2**30:.3f}"),
    "wait_pct": ("data wait", "{:.2f}%".format),
    "ratio": ("ratio", "{:.2f}".format),
    "limit": ("limit", "{:.2f}".format),
}
"""Columns that some records have: head, and how a value is written."""


def limits(records: Iterable[Record]) -> list[str]:
    """Lines that name the ratios above their limits; nothing where no record has a limit."""
    limited = [(record, record.ratio, record.limit) for record in records if record.ratio and record.limit]
    above = [
        f"above its limit: {record.group} {record.case}: ratio {ratio:.2f}, limit {limit:.2f}"
        for record, ratio, limit in limited
        if ratio > limit
    ]
    return above or (["all ratios are within their limits"] if limited else [])


def aligned(lines: Sequence[Sequence[str]], names: int) -> str:
    """Lines of a table, head first: the first ``names`` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def cell(place: int, text: str) -> str:
        return text.ljust(widths[place]) if place < names else text.rjust(widths[place])

    return "\n".join("  ".join(cell(*pair) for pair in enumerate(line)).rstrip() for line in lines)


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


def checkout_commit() -> tuple[str, bool | None]:
    """Commit of the checkout that runs, and whether files differ from it; ("", None) for an installed package."""
    root = Path(erd_fast.__file__).resolve().parent.parent
    if not (root / "csrc").is_dir():  # site-packages, maybe in a checkout of something else
        return "", None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    return commit, bool(_output("git", "-C", str(root), "status", "--porcelain")) if commit else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
