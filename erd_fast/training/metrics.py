"""What a run reports about itself: log.jsonl, metrics.json, speed."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from erd_fast.errors import RunError
from erd_fast.files import read_json, write_json, write_text

# Dense bf16 matrix peak of the datasheets, TFLOP/s. No entry, no mfu.
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}


class RunLog:
    """``log.jsonl``, one JSON object a line, and ``metrics.json``, the last value of every metric."""

    def __init__(self, folder: Path):
        self._file, self._metrics = folder / "log.jsonl", folder / "metrics.json"
        self.last: dict[str, Any] = read_json(self._metrics) if self._metrics.is_file() else {}

    def cut_back(self, step: int) -> None:
        """Drop what a run that went further than its checkpoint logged after ``step``, and a half-written last line."""
        kept = [line for line in read_log(self._file) if line["step"] <= step]
        write_text(self._file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self._file}: {error.strerror}") from error
        if "event" not in line:
            self.last.update(line)

    def write_metrics(self) -> None:
        """Write ``metrics.json``: the last value of every metric logged."""
        write_json(self._metrics, self.last)


def read_log(file: Path) -> list[dict[str, Any]]:
    """Whole lines of a log.jsonl; a last line cut off by a kill is left out."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Speed:
    """Rates since the last log line. Reading the loss synchronises, so host time is device time here."""

    def __init__(self, flops_per_image: int, device: torch.device):
        self._flops = 3 * flops_per_image  # forward once, backward twice; no credit for recompute
        self._device = device
        self._peak = None
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self._peak = next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)
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
