"""The residual stream of a transformer: each branch's end is one pass with the normalisation that follows it."""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erd_fast.nn.rebuild import rebuilt
from erd_fast.ops import Branch, ada_layer_norm, residual_ada_layer_norm
from erd_fast.ops.residual_ada_layer_norm import rebuild_normalized


class Norm(NamedTuple):
    """A LayerNorm with its modulation (shift, scale), or its own weight and bias: arguments of the ops."""

    eps: float
    shift: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.LayerNorm) -> "Norm":
        """An affine layer's."""
        return cls(layer.eps, weight=layer.weight, bias=layer.bias)

    def detached(self) -> "Norm":
        return Norm(self.eps, *(None if tensor is None else tensor.detach() for tensor in self[1:]))


class Stream:
    """The stream x (N, T, D) and y, the input of the branch that comes next.

    For the backward pass a branch keeps its output, and every second one the stream before it. With ``recompute`` no y
    is kept: it is made again from what is kept anyway.

    Attributes:
        x: in the stream's dtype. y: in the dtype of matrix products.
    """

    def __init__(self, x: Tensor, norm: Norm, dtype: torch.dtype, recompute: bool):
        self.x, self.dtype, self.recompute = x, dtype, recompute
        self._source: Branch | None = None
        self.restart(x, norm)

    def restart(self, x: Tensor, norm: Norm) -> None:
        """Go on with another stream, ``x``, whose normalisation comes first."""
        self.x, self._source = x, None
        self.y = ada_layer_norm(x, **norm._asdict(), dtype=self.dtype)
        self._again = functools.partial(_normalized, x.detach(), norm.detached(), self.dtype)

    def branch(self, layer: Callable[[Tensor], Tensor], gate: Tensor | None, norm: Norm) -> None:
        """x <- x + gate layer(y), y <- norm(x); a gate that is None is 1."""
        before, out = self.x, self._through(layer)
        how = {**norm._asdict(), "dtype": self.dtype}
        self.x, self.y = residual_ada_layer_norm(before, out, gate, source=self._source, **how)
        if self._source is None:  # this stream is kept as it was before the branch
            self._source = Branch(before, out, gate)
            kept = Branch(before.detach(), out.detach(), None if gate is None else gate.detach())
            self._again = functools.partial(rebuild_normalized, kept, dtype=self.dtype, **norm.detached()._asdict())
        else:  # and this one will be by the next branch
            self._source = None
            self._again = functools.partial(_normalized, self.x.detach(), norm.detached(), self.dtype)

    def last_branch(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """x + layer(y), where no normalisation follows."""
        return self.x + self._through(layer)

    def _through(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        with rebuilt(self.y, self._again) if self.recompute else contextlib.nullcontext():
            return layer(self.y)


@torch.no_grad()
def _normalized(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    return ada_layer_norm(x, **norm._asdict(), dtype=dtype)
