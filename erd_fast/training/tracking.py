"""A run's metrics in TensorBoard or Weights & Biases, beside its log.jsonl."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from erd_fast.extras import load

Track = Literal["none", "tensorboard", "wandb"]


class Tracker(Protocol):
    """Where metrics go."""

    def write(self, line: dict[str, Any]) -> None:
        """A line of the log: ``step`` and metrics."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_tracker(track: Track, folder: Path, config: dict[str, Any]) -> Tracker | None:
    """The tracker called ``track``, for the run in ``folder`` with this configuration; None for ``none``.

    Raises:
        ConfigError: its package is not installed.
    """
    if track == "tensorboard":
        return _TensorBoard(load("torch.utils.tensorboard", "track", f"train.track {track}"), folder)
    if track == "wandb":
        return _Wandb(load("wandb", "track", f"train.track {track}"), folder, config)
    return None


class _TensorBoard:
    """``folder/tensorboard``."""

    def __init__(self, tensorboard: ModuleType, folder: Path):
        self._writer = tensorboard.SummaryWriter(folder / "tensorboard")

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _numbers(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the project erd-fast with the folder's name; the same folder goes on with it. WANDB_MODE, WANDB_PROJECT
    and the like act as ever."""

    def __init__(self, wandb: ModuleType, folder: Path, config: dict[str, Any]):
        file = folder / "wandb-id"
        name = file.read_text() if file.is_file() else uuid.uuid4().hex
        file.write_text(name)
        how = {"id": name, "resume": "allow", "name": folder.resolve().name, "dir": folder, "config": config}
        settings = wandb.Settings(console="off", silent=True)
        project = os.environ.get("WANDB_PROJECT", "erd-fast")
        self._run = wandb.init(**how, settings=settings, project=project)

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(dict(_numbers(line)), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Metrics with one number each: of a list, its items by number."""
    for name, value in line.items():
        if name != "step":
            parts = enumerate(value) if isinstance(value, list) else [("", value)]
            yield from ((f"{name}/{part}".rstrip("/"), number) for part, number in parts if number is not None)
