"""Linear layers of one input as one matrix product, each with its own parameters and their names.

:func:`join` moves the parameters of the layers next to each other, so that all weights are one matrix without a copy;
where something moved them apart since, they are copied together at each call, with the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def join(layers: Sequence[nn.Linear]) -> None:
    """Put weights, and biases, of ``layers`` next to each other in memory. Their values and names stay."""
    pairs: tuple[list[Tensor], list[Tensor]] = ([one.weight for one in layers], [one.bias for one in layers])
    for parts in pairs:
        if parts[0].is_meta or _adjacent(parts):
            continue
        for part, place in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
            part.data = place


def joined_linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """torch.cat([layer(x) for layer in layers], dim=-1) as one product."""
    return F.linear(x, _as_one([layer.weight for layer in layers]), _as_one([layer.bias for layer in layers]))


def _as_one(parts: Sequence[Tensor]) -> Tensor:
    if torch.compiler.is_compiling() or not _adjacent(parts):
        return torch.cat(list(parts))
    return _View.apply(*parts)


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether each part ends where the next one begins, in one storage."""
    first = parts[0]
    if any(type(part) is not nn.Parameter or not part.is_contiguous() for part in parts) or first.is_meta:
        return False
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != place or part.dtype != first.dtype:
            return False
        place += part.numel()
    return True


class _View(torch.autograd.Function):
    """Adjacent tensors as one, whose gradient is cut into theirs: neither is copied."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.rows = [len(part) for part in parts]
        first = parts[0].detach()
        return first.as_strided((sum(ctx.rows), *first.shape[1:]), first.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split(ctx.rows)
