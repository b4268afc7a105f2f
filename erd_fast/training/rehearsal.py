"""Before the first step: which backend is the fastest for each op, and whether a step fits into memory."""

from pathlib import Path

import torch

from erd_fast.errors import ConfigError, RunError
from erd_fast.files import read_json, write_json
from erd_fast.numerics import is_out_of_memory
from erd_fast.ops import Autotuner, Recording, autotune, record
from erd_fast.ops.core.autotune import Choices, device_name
from erd_fast.training.step import TrainStep

_GIB = 2**30


def rehearse(step: TrainStep, tuner: Autotuner, file: Path) -> int:
    """Time what ops can run on, unless the run has stored that, on the first rank for all; load kernels; see what fits.

    A deterministic run takes each op's first backend: the fastest one by time need not be the same twice.

    Returns:
        Bytes that a step takes of this rank's GPU, beside what is allocated; 0 on a CPU.

    Raises:
        ConfigError: ``file`` does not hold choices. RunError: the micro-batch does not fit into the GPU.
    """
    chosen, needed = step.ranks.from_first(lambda: _choose(step, tuner, file))
    tuner.timing = False
    tuner.load(chosen, step.device, str(file))
    with autotune(tuner), record():
        return step.ranks.together(lambda: needed if step.ranks.first or step.device.type != "cuda" else _pass(step))


def write_choices(step: TrainStep, tuner: Autotuner, recording: Recording, file: Path) -> None:
    """Store what each op runs on, and why."""
    content = {"device": device_name(step.device), "used": recording.names(), "choices": tuner.choices(step.device)}
    write_json(file, {**content, "left_out": tuner.left_out})


def _choose(step: TrainStep, tuner: Autotuner, file: Path) -> tuple[Choices, int]:
    """What ops run on, and what :func:`_pass` gives."""
    if file.exists():
        stored = read_json(file)
        if not isinstance(stored, dict):
            raise ConfigError(f"{file}: given {stored!r}, allowed what a run has written there")
        if stored.get("device") == device_name(step.device):
            tuner.load(stored.get("choices"), step.device, str(file))
    tuner.timing = not step.config.train.deterministic
    with autotune(tuner), record():
        needed = _pass(step)
    return tuner.choices(step.device), needed


def _pass(step: TrainStep) -> int:
    """Rehearse with a micro-batch. Returns the bytes that it takes beside what is allocated."""
    if step.device.type != "cuda":
        step.rehearse(step.micro_batch)
        return 0
    peak = _peak_bytes(step, step.micro_batch)
    available = torch.cuda.mem_get_info(step.device)[0] + torch.cuda.memory_reserved(step.device)
    if peak is None or peak + _later_bytes(step) > available:
        raise RunError(_what_fits(step, available))
    torch.cuda.empty_cache()  # a captured step has memory of its own
    torch.cuda.reset_peak_memory_stats(step.device)
    return peak + _later_bytes(step) - torch.cuda.memory_allocated(step.device)


def _what_fits(step: TrainStep, available: int) -> str:
    one = _peak_bytes(step, 1)
    if one is None:
        return f"model.name: {step.config.model.name} does not fit into this GPU's {available / _GIB:.2f} GiB"
    two = _peak_bytes(step, 2)
    per_image = available if two is None else two - one
    summed = sum(4 * p.numel() for p in step.model.parameters() if p.dtype != torch.float32)  # over micro-batches
    return too_large(step.micro_batch, _share(step), available, one + _later_bytes(step) + summed, per_image)


def too_large(micro_batch: int, share: int, available: int, one: int, per_image: int) -> str:
    """What to do about a micro-batch that does not fit: ``one`` are the bytes with one image, ``per_image`` those of
    each further one, ``share`` the images of a step on this rank."""
    fit = 1 + (available - one) // max(per_image, 1)
    measured = f"a step takes {one / _GIB:.2f} GiB with one image and {per_image / _GIB:.3f} GiB for each further one"
    divisors = [size for size in range(1, share + 1) if share % size == 0 and size <= fit]
    if not divisors:
        return f"model.name: {measured}, and this GPU has {available / _GIB:.2f} GiB: take a smaller model"
    return (
        f"train.micro_batch: given {micro_batch}; {measured}, so that {fit} fit into the {available / _GIB:.2f} GiB of "
        f"this GPU: take --train.micro_batch {divisors[-1]}, which changes memory and not the batch"
    )


def _peak_bytes(step: TrainStep, images: int) -> int | None:
    """Most memory that is allocated during a step on ``images`` images; None if it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(step.device)
    try:
        step.rehearse(images)
        torch.cuda.synchronize(step.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return torch.cuda.max_memory_allocated(step.device)


def _later_bytes(step: TrainStep) -> int:
    """Moments and averages, which the optimizer makes in its first step."""
    state = step.optimizer.state
    return sum(3 * 4 * p.numel() for p in step.model.parameters() if p not in state)


def _share(step: TrainStep) -> int:
    return step.micro_batch * step.micro_batches
