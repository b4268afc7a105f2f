"""What tests of whole runs share: ways to end one, and what its folder holds."""

import json
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing of it acts on this."""


def die() -> None:
    raise Killed


def events(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"]) for line in lines if "event" in line]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def same_weights(one: Path, other: Path, step: int) -> bool:
    names = [path / "checkpoints" / f"step-{step:08d}" for path in (one, other)]
    for file in ("model.safetensors", "ema.safetensors", "training.safetensors"):
        first, second = (load_file(name / file) for name in names)
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
            return False
    return True
