"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

::

    checkpoints/step-00000120/
        model.safetensors      parameters (float32) and buffers, stock keys
        ema.safetensors        the same with averaged parameters: what samples
        training.safetensors   AdamW's moments and counts, and the sums of the open log interval
        state.json             step, images, sizes of the model and the objective
"""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erd_fast.data.manifest import are_numbers, is_range
from erd_fast.errors import DataError
from erd_fast.files import new_folder, read_json, write_json
from erd_fast.training.step import TrainStep

FORMAT_VERSION = 2
_MOMENTS, _COUNTED = ("exp_avg", "exp_avg_sq"), ("counts", "scalars")


@dataclasses.dataclass(frozen=True)
class CheckpointState:
    """``state.json``."""

    step: int
    images: int
    data: str
    """Fingerprint of the store."""
    model: dict[str, Any]
    """Name and arguments for ``create_model``."""
    schedule: str
    target: str
    kind: str
    """What the store holds; so are the next five, as in its manifest."""
    scale: list[float]
    shift: list[float]
    vae: str = ""
    vae_source: str = ""
    pixel_range: Sequence[float] = (-1.0, 1.0)
    format_version: int = FORMAT_VERSION


def save_checkpoint(
    folder: Path, state: CheckpointState, step: TrainStep, totals: dict[str, Tensor], keep: int
) -> Path:
    """Write ``folder/step-XXXXXXXX`` and remove all but the newest ``keep`` (0: none is removed). ``totals`` are those
    of all ranks."""
    path = folder / f"step-{state.step:08d}"
    if not path.is_dir():
        with new_folder(path) as partial:
            buffers, optimizer = dict(step.model.named_buffers()), step.optimizer
            named = dict(step.model.named_parameters())
            weights = {name: optimizer.master(parameter) for name, parameter in named.items()}
            averages = {name: optimizer.average(parameter) for name, parameter in named.items()}
            save_file(_on_cpu(weights | buffers), partial / "model.safetensors")
            save_file(_on_cpu(averages | buffers), partial / "ema.safetensors")
            save_file(_on_cpu(_training_tensors(step, totals)), partial / "training.safetensors")
            write_json(partial / "state.json", dataclasses.asdict(state))
    if keep:
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's ``checkpoints`` folder, by its step, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def load_state(path: Path) -> CheckpointState:
    """Read ``state.json``. Raises DataError for another version or a damaged file."""
    content = read_json(path / "state.json")
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version {version}; this version of erd-fast reads {FORMAT_VERSION}")
    try:
        state = CheckpointState(**content)
    except TypeError as error:
        raise DataError(f"{path / 'state.json'}: {error}") from error
    _check_decoding(state, path / "state.json")
    return state


def _check_decoding(state: CheckpointState, file: Path) -> None:
    """What samples are decoded by. Raises DataError naming the field."""
    channels = state.model.get("in_channels") if isinstance(state.model, dict) else None
    for field, right, allowed in (
        ("vae", isinstance(state.vae, str), "text"),
        ("vae_source", isinstance(state.vae_source, str), "text"),
        ("pixel_range", is_range(state.pixel_range), "two numbers, the smaller one first"),
        *(
            (field, are_numbers(given) and len(given) in (0, channels), f"{channels} numbers or none")
            for field, given in (("scale", state.scale), ("shift", state.shift))
        ),
    ):
        if not right:
            raise DataError(f"{file}: {field} must be {allowed}, got {getattr(state, field)!r}")


def load_weights(path: Path, model: nn.Module, ema: bool = True) -> None:
    """Load parameters (their averages with ``ema``) into ``model``. Raises DataError if they do not fit or are
    damaged."""
    file = path / ("ema.safetensors" if ema else "model.safetensors")
    weights = _read(file)
    try:
        model.load_state_dict(weights, assign=next(model.parameters()).is_meta)
    except RuntimeError as error:
        raise DataError(f"{file} does not fit the model: {error}") from error


@torch.no_grad()
def restore(path: Path, state: CheckpointState, step: TrainStep) -> None:
    """Put parameters, averages, moments, counts, open sums and the image counter back as they were saved, bit for bit;
    sums on the first rank alone."""
    load_weights(path, step.model, ema=False)
    weights, averages, tensors = (_read(path / f"{name}.safetensors") for name in ("model", "ema", "training"))
    optimizer, found = step.optimizer, {}
    try:
        for number, (name, parameter) in enumerate(step.model.named_parameters()):
            found[number] = {kind: tensors[f"{kind}.{name}"] for kind in _MOMENTS} | {"ema": averages[name]}
            if parameter.dtype != torch.float32:
                found[number]["master"] = weights[name]
        own = {name: tensors[f"optimizer.{name}"] for name in _COUNTED}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": found, "erd_fast": own})
        for name, total in step.totals.items():
            if step.ranks.first or name == "steps":
                total.copy_(tensors[f"totals.{name}"])
    except KeyError as error:
        raise DataError(f"{path}: tensor {error} is missing") from error
    step.counter.fill_(state.images)


def _training_tensors(step: TrainStep, totals: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"totals.{name}": total for name, total in totals.items()}
    own = step.optimizer.state_dict()["erd_fast"]
    tensors |= {f"optimizer.{name}": own[name] for name in _COUNTED}
    for name, parameter in step.model.named_parameters():
        for kind in _MOMENTS:
            tensors[f"{kind}.{name}"] = step.optimizer.state[parameter][kind]
    return tensors


def _complete(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
