"""Keeping the recipe of a tensor for the backward pass, in place of the tensor."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Recipe:
    """Makes a tensor again, in the shape in which it was kept."""

    def __init__(self, make: Callable[[], Tensor], shape: torch.Size):
        self.make, self.shape = make, shape


def rebuilt(tensor: Tensor, make: Callable[[], Tensor]) -> contextlib.AbstractContextManager[Any]:
    """What runs in this block and would save ``tensor`` for its backward pass keeps ``make`` instead, which must give
    the same bits. Within torch.compile the compiler decides itself what to keep; tensors that have no memory of their
    own to be known by (subclasses, functorch's, traced ones) are kept as ever.

    Hooks of saved tensors that surround the block do not see what is saved within it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _has_memory(tensor):
        return contextlib.nullcontext()
    place, count, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype

    def pack(saved: Tensor) -> Tensor | _Recipe:
        same = saved.dtype == dtype and saved.numel() == count and saved.is_contiguous() and saved.data_ptr() == place
        # Detached: a node that saves its own output would otherwise own itself, and live for ever without a backward
        # pass.
        return _Recipe(make, saved.shape) if same else saved.detach()

    def unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.make().view(kept.shape) if isinstance(kept, _Recipe) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _has_memory(tensor: Tensor) -> bool:
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return type(tensor) is Tensor and not watched and not tensor.is_meta
