"""Where the time of a step goes: a trace for a browser and a table of kernels by kind, of a few steps of a run.

On a GPU the rows are kernels; on a CPU PyTorch's operators, each without those that it calls. What is left of the
steps' time is gaps: nothing was running.
"""

import collections
import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from erd_fast.files import make_folder, write_json, write_text

STEPS = 5
_WAIT, _WAIT_REPLICATED = 6, 14
"""Steps before the profile: a CUDA graph has been captured by then."""
_SHOWN, _WIDTH = 20, 60
_KINDS = {
    "communication": r"nccl|gloo|all_?reduce",
    "attention": r"flash|fmha|attention|attn",
    "matrix": r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|conv(?!ert)|aten::(addmm|mm|bmm|baddbmm)$|(?<![a-z])linear",
}
"""Of a kernel or operator by its name, the first that fits; what none fits moves memory."""


class Row(NamedTuple):
    """A kernel over the profiled steps."""

    kind: str
    name: str
    calls: int
    seconds: float


class StepProfiler:
    """Profiles some steps of a run: call :meth:`before` and :meth:`after` around every step."""

    def __init__(self, folder: Path, device: torch.device, replicated: bool, steps_left: int):
        self._folder, self._device = folder, device
        wait = _WAIT_REPLICATED if replicated else _WAIT
        self._begin = min(wait, max(steps_left - STEPS, 0))
        self._end = min(self._begin + STEPS, steps_left)
        self._taken = 0
        self._profile: profile | None = None

    def before(self) -> None:
        """Begin if it is time."""
        if self._taken == self._begin and self._end > self._begin:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # where there is no GPU it complains of that
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            self._settle()
            self._profile = profile(activities=kinds)
            self._profile.start()

    def after(self) -> str | None:
        """Count a step; after the last one write ``trace.json``, ``kernels.json`` and ``kernels.txt``, and return the
        table."""
        self._taken += 1
        if self._profile is None or self._taken != self._end:
            return None
        self._settle()
        profiled, self._profile = self._profile, None
        profiled.stop()
        rows, seconds = rows_of(profiled.events() or (), on_gpu=self._device.type == "cuda")
        steps = self._end - self._begin
        text = table(rows, seconds, steps)
        make_folder(self._folder)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "trace.json").unlink()  # of an earlier profile: PyTorch does not replace it
        profiled.export_chrome_trace(str(self._folder / "trace.json"))
        content = {"steps": steps, "seconds": seconds, "kernels": [row._asdict() for row in rows]}
        write_json(self._folder / "kernels.json", content)
        write_text(self._folder / "kernels.txt", text)
        return text

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def rows_of(events: Iterable[Any], *, on_gpu: bool) -> tuple[list[Row], float]:
    """(kernels with gaps among them, the longest first; seconds from the first one's begin to the last one's end)."""
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    spans = []
    for event in events:
        named = on_gpu and getattr(event, "is_user_annotation", False)  # a range over kernels, and none itself
        if (event.device_type == DeviceType.CUDA) != on_gpu or named:
            continue
        begin, end = event.time_range.start, event.time_range.end
        spans.append((begin, end))
        sums[event.name][0] += 1
        sums[event.name][1] += (end - begin if on_gpu else event.self_cpu_time_total) / 1e6
    if not spans:
        return [], 0.0
    seconds = (max(end for _, end in spans) - min(begin for begin, _ in spans)) / 1e6
    rows = [Row(kind_of(name), name, int(calls), spent) for name, (calls, spent) in sums.items()]
    rows.append(Row("gaps", "", 0, seconds - _covered(spans) / 1e6))
    return sorted(rows, key=lambda row: -row.seconds), seconds


def kind_of(name: str) -> str:
    """matrix, attention, communication or memory."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "memory")


def table(rows: list[Row], seconds: float, steps: int) -> str:
    """Milliseconds a step by kind, then by kernel."""
    kinds: dict[str, float] = collections.defaultdict(float)
    for row in rows:
        kinds[row.kind] += row.seconds
    lines = [f"{'of a step':<{_WIDTH}}  {'calls':>7}  {'ms':>9}  {'%':>5}"]

    def line(name: str, calls: str, spent: float) -> None:
        shown = name if len(name) <= _WIDTH else f"{name[: _WIDTH - 1]}…"
        lines.append(f"{shown:<{_WIDTH}}  {calls:>7}  {1e3 * spent / steps:>9.3f}  {100 * spent / seconds:>5.1f}")

    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        line(kind, "", spent)
    lines.append("")
    for row in [row for row in rows if row.kind != "gaps"][:_SHOWN]:
        line(row.name, f"{row.calls / steps:.1f}", row.seconds)
    line("all", "", seconds)
    return "\n".join(lines) + "\n"


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, -float("inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
