"""The residual stream of a transformer: each branch's end is one pass with the normalisation that follows it."""

import contextlib
import contextvars
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

    _source: Branch | None
    """What x was made of, if the stream before it is kept in its place."""
    _again: Callable[[], Tensor] | None
    """How y is made again, with ``recompute``."""

    def __init__(self, x: Tensor, norm: Norm, dtype: torch.dtype, recompute: bool):
        self.dtype, self.recompute = dtype, recompute
        self.restart(x, norm)

    def restart(self, x: Tensor, norm: Norm) -> None:
        """Go on with another stream, ``x``, whose normalisation comes first."""
        self.x, self._source = x, None
        self.y = ada_layer_norm(x, **norm._asdict(), dtype=self.dtype)
        self._keep(x, norm)

    def branch(self, layer: Callable[[Tensor], Tensor], gate: Tensor | None, norm: Norm) -> None:
        """x <- x + gate layer(y), y <- norm(x); a gate that is None is 1."""
        before, out = self.x, self._through(layer)
        how = {**norm._asdict(), "dtype": self.dtype}
        self.x, self.y = residual_ada_layer_norm(before, out, gate, source=self._source, **how)
        if self._source is None and torch.is_grad_enabled():  # this stream is kept as it was before the branch
            self._source = Branch(before, out, gate)
            self._keep(self._source, norm)
        else:  # and this one will be by the next branch
            self._source = None
            self._keep(self.x, norm)

    def last_branch(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """x + layer(y), where no normalisation follows."""
        return self.x + self._through(layer)

    def _through(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        with contextlib.nullcontext() if self._again is None else rebuilt(self.y, self._again):
            return layer(self.y)

    def _keep(self, made_of: Tensor | Branch, norm: Norm) -> None:
        """How y is recomputed: from a stream that is kept, or from what a stream was made of. In the context of the
        forward pass, so by the same backend: the backward pass may run in a thread that has no ``use_backend``."""
        self._again = None
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            run = contextvars.copy_context().run
            self._again = functools.partial(run, _normalized, _detached(made_of), norm.detached(), self.dtype)


def _detached(made_of: Tensor | Branch) -> Tensor | Branch:
    if isinstance(made_of, Tensor):
        return made_of.detach()
    gate = None if made_of.gate is None else made_of.gate.detach()
    return Branch(made_of.x.detach(), made_of.branch.detach(), gate)


@torch.no_grad()
def _normalized(made_of: Tensor | Branch, norm: Norm, dtype: torch.dtype) -> Tensor:
    if isinstance(made_of, Tensor):
        return ada_layer_norm(made_of, **norm._asdict(), dtype=dtype)
    return rebuild_normalized(made_of, **norm._asdict(), dtype=dtype)
