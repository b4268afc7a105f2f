"""Linear layers of one input as one matrix product, each with its own parameters and their names.

:func:`join` moves the parameters of the layers next to each other, so that all weights are one matrix without a copy.
Where they lie apart, as in a deep copy until its next ``.to()``, each layer has a product of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def join(layers: Sequence[nn.Linear]) -> None:
    """Put weights, and biases, of ``layers`` next to each other in memory. Their values and names stay. What is of
    several dtypes or devices, shared between processes or on the meta device is left where it is."""
    pairs: tuple[list[Tensor], list[Tensor]] = ([one.weight for one in layers], [one.bias for one in layers])
    for parts in pairs:
        kinds = {(part.dtype, part.device) for part in parts}
        if len(kinds) > 1 or parts[0].is_meta or any(part.is_shared() for part in parts if not part.is_cuda):
            continue
        if not _adjacent(parts):
            for part, place in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                part.data = place


def joined_linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """torch.cat([layer(x) for layer in layers], dim=-1), as one product where the parameters are joined."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or not (_adjacent(weights) and _adjacent(biases)):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    return F.linear(x, _View.apply(*weights), _View.apply(*biases))


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
