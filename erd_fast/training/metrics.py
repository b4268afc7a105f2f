"""What a run reports about itself: log.jsonl, metrics.json, speed."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from erd_fast.errors import DataError, RunError
from erd_fast.files import write_json, write_text
from erd_fast.training.tracking import Tracker

# Dense bf16 and fp16 matrix peak of the datasheets, TFLOP/s, SXM boards. No entry, no mfu.
_PEAK_TFLOPS = {"A100": 312.0, "H100 80GB HBM3": 989.0, "H200": 989.0}


def peak_tflops(device: torch.device) -> float | None:
    """What this GPU's datasheet promises for bfloat16 matrix products, if it is known."""
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)


class RunLog:
    """``log.jsonl``, one JSON object a line, and ``metrics.json``, the last value of every metric."""

    def __init__(self, folder: Path, fixed: dict[str, Any], writes: bool = True):
        """``fixed`` are metrics that do not change; a rank that does not write keeps the last values alone."""
        self.tracker: Tracker | None = None
        self._file, self._metrics = folder / "log.jsonl", folder / "metrics.json"
        self._fixed, self._writes = fixed, writes
        self._take(read_log(self._file))

    def cut_back(self, step: int) -> None:
        """Drop what a run that went further than its checkpoint logged after ``step``, and a half-written last line."""
        kept = [line for line in read_log(self._file) if line["step"] <= step]
        if self._writes:
            write_text(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._take(kept)

    def has(self, metric: str, step: int) -> bool:
        """Whether ``metric`` was logged at ``step``, as it may have been before a kill."""
        return any(metric in line for line in read_log(self._file) if line["step"] == step)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        if "event" not in line:
            self.last |= line
        if not self._writes:
            return
        if self.tracker is not None and "event" not in line:
            self.tracker.write(line)
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self._file}: {error.strerror}") from error

    def _take(self, lines: list[dict[str, Any]]) -> None:
        self.last: dict[str, Any] = dict(self._fixed)
        for line in lines:
            if "event" not in line:
                self.last |= line

    def write_metrics(self) -> None:
        """Write ``metrics.json``: the last value of every metric logged."""
        if self._writes:
            write_json(self._metrics, self.last)


def read_log(file: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; one cut off by a kill is left out. Raises DataError for any other damage."""
    if not file.is_file():
        return []
    texts = file.read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts[:-1], start=1):  # what follows the last newline is no whole line
        try:
            line = json.loads(text)
            line["step"] += 0
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}, line {number}: no log line: {error!r}") from error
        lines.append(line)
    return lines


class Speed:
    """Rates since the last log line. Reading the loss synchronises, so host time is device time here."""

    def __init__(self, flops_per_image: int, device: torch.device, precision: str, world_size: int = 1):
        self._flops = 3 * flops_per_image  # forward once, backward twice; no credit for recompute
        self._device = device
        self._peak = None
        if device.type == "cuda" and precision in ("bf16", "fp16") and (peak := peak_tflops(device)):
            self._peak = world_size * peak
        self.waited = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, for instance after a preview or a checkpoint that the rates shall not count."""
        self._began, self.waited, self._images, self._steps, self._paused = time.perf_counter(), 0.0, 0, 0, 0.0

    def pause(self, seconds: float) -> None:
        """Do not count ``seconds`` of this interval."""
        self._paused += seconds

    def count(self, images: int) -> None:
        """One more step of ``images``."""
        self._images += images
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The metrics of the interval; begins the next."""
        seconds = time.perf_counter() - self._began - self._paused
        rate = self._images / seconds
        tflops = rate * self._flops / 1e12
        metrics = {
            "images_per_sec": round(rate, 2),
            "step_ms": round(1e3 * seconds / self._steps, 3),
            "tflops": round(tflops, 4),
            "data_wait_pct": round(100 * self.waited / seconds, 3),
        }
        if self._peak:
            metrics["mfu"] = round(tflops / self._peak, 4)
        if self._device.type == "cuda":
            metrics["max_reserved_gib"] = round(torch.cuda.max_memory_reserved(self._device) / 2**30, 3)
        self.restart()
        return metrics
