"""Checks that ops share: op, argument, given, allowed."""

import math

import torch
from torch import Tensor

_FEW = 64  # numbers that Python compares faster than PyTorch


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device, where it is on."""
    kind = "cpu" if tensor.is_cpu else tensor.device.type  # the latter takes longer than all the rest
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which raises for types that have none
        return torch.get_autocast_dtype(kind)
    return None


def check_tensor(
    op: str,
    argument: str,
    given: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raise ValueError unless ``given`` is None or has this shape, one of the dtypes, and is on this device."""
    if given is None or (given.shape == shape and given.dtype in dtypes and given.device == device):
        return
    check_shape(op, argument, given, shape)
    check_dtype(op, argument, given, *dtypes)
    raise ValueError(f"{op}: {argument} must be on {device} as the other tensors, got {given.device}")


def check_shape(op: str, argument: str, given: Tensor | None, allowed: tuple[int, ...]) -> None:
    """Raise ValueError unless ``given`` is None or has the shape ``allowed``: nothing broadcasts by accident."""
    if given is not None and given.shape != allowed:
        raise ValueError(f"{op}: {argument}: given shape {tuple(given.shape)}, allowed {tuple(allowed)}")


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} as {first}, got {tensor.device}")


def check_dtype(op: str, argument: str, given: Tensor | None, *allowed: torch.dtype) -> None:
    """Raise ValueError unless ``given`` is None or has one of the dtypes."""
    if given is not None and given.dtype not in allowed:
        raise ValueError(f"{op}: {argument}: given {given.dtype}, allowed {', '.join(map(str, allowed))}")


def check_dense(op: str, argument: str, given: Tensor) -> None:
    """Raise ValueError unless ``given`` fills its memory without holes, in whatever order of dimensions."""
    # PyTorch knows this property, and tells it only by what an empty_like keeps.
    if not given.is_contiguous() and torch.empty_like(given, device="meta").stride() != given.stride():
        raise ValueError(
            f"{op}: {argument}: given strides {given.stride()} of shape {tuple(given.shape)}, allowed dense memory"
        )


def check_rows(op: str, argument: str, given: Tensor | None, limit: int) -> None:
    """Raise ValueError unless ``given`` holds rows in [0, limit). On a GPU it is not read back: kernels check there."""
    if given is None or not _readable(given):
        return
    low, high = _extremes(given)
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {argument}: given {low if low < 0 else high}, allowed 0 to {limit - 1}")


def check_finite(op: str, argument: str, given: Tensor) -> None:
    """Raise ValueError unless all numbers of a table are finite. On a GPU they are not read back."""
    if not _readable(given) or math.isfinite(given.sum().item()):
        return
    rows = (~torch.isfinite(given)).reshape(given.shape[0], -1).any(1).nonzero()
    if len(rows):  # else only the sum overflowed
        row = int(rows[0])
        raise ValueError(f"{op}: {argument}: given {given[row].tolist()} in row {row}, allowed finite numbers")


def _readable(given: Tensor) -> bool:
    """Whether looking at the numbers costs no synchronisation, and there are some: a trace has shapes alone."""
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return given.device.type == "cpu" and not tracing and given.numel() > 0


def _extremes(given: Tensor) -> tuple[float, float]:
    if given.numel() <= _FEW:
        numbers = given.flatten().tolist()
        return min(numbers), max(numbers)
    low, high = given.aminmax()
    return low.item(), high.item()
