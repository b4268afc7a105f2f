"""Checks that ops share: op, argument, given, allowed."""

import torch
from torch import Tensor


def check_shape(op: str, argument: str, given: Tensor | None, allowed: tuple[int, ...]) -> None:
    """Raise ValueError unless ``given`` is None or has the shape ``allowed``: nothing broadcasts by accident."""
    if given is not None and tuple(given.shape) != allowed:
        raise ValueError(f"{op}: {argument}: given shape {tuple(given.shape)}, allowed {allowed}")


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    there = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    first, device = there[0]
    for name, other in there[1:]:
        if other != device:
            raise ValueError(f"{op}: {name}: given a tensor on {other}, allowed {device}, where {first} is")


def check_dtype(op: str, argument: str, given: Tensor | None, *allowed: torch.dtype) -> None:
    """Raise ValueError unless ``given`` is None or has one of the dtypes."""
    if given is not None and given.dtype not in allowed:
        raise ValueError(f"{op}: {argument}: given {given.dtype}, allowed {', '.join(map(str, allowed))}")


def check_rows(op: str, argument: str, given: Tensor | None, limit: int) -> None:
    """Raise ValueError unless ``given`` holds rows in [0, limit). On a GPU it is not read back: kernels check there."""
    if given is None or given.device.type != "cpu" or torch.compiler.is_compiling() or not given.numel():
        return
    low, high = (int(value) for value in given.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {argument}: given {low if low < 0 else high}, allowed 0 to {limit - 1}")


def check_finite(op: str, argument: str, given: Tensor | None) -> None:
    """Raise ValueError unless all numbers are finite. On a GPU they are not read back."""
    if given is None or given.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.isfinite(given).all():
        row = int((~torch.isfinite(given)).reshape(len(given), -1).any(1).nonzero()[0])
        raise ValueError(f"{op}: {argument}: given {given[row].tolist()} in row {row}, allowed finite numbers")
