"""residual_ada_layer_norm: a branch joins the residual stream and the next one gets its normalised input: one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erd_fast.ops.ada_layer_norm import (
    FLOATS,
    ada_layer_norm_reference,
    check_tokens,
    modulation,
    normalized,
    normalized_backward,
    output_dtype,
    statistics,
    sums,
)
from erd_fast.ops.checks import check_tensor
from erd_fast.ops.core.backend import Triton
from erd_fast.ops.core.op import Op, Pass, reference_needed

_OP = "residual_ada_layer_norm"


class Branch(NamedTuple):
    """What a stream was made of: ``x + gate * branch``."""

    x: Tensor
    branch: Tensor
    gate: Tensor | None


def residual_ada_layer_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    source: Branch | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate branch, and y = ada_layer_norm(x', shift, scale) or with weight and bias: (x', y), each rounded
    once (:func:`erd_fast.ops.ada_layer_norm`; docs/math.md E1).

    The backward pass makes x' again from x and branch, which it reads anyway, so x' is not saved.

    Args:
        x: (N, T, D), the residual stream, float32, bfloat16 or float16, which x' has too.
        branch: (N, T, D), of a dtype of its own.
        gate: (N, D), of the dtype of shift and scale; None is 1.
        shift, scale, weight, bias, eps, dtype: as those of ``ada_layer_norm``.
        source: what x was made of by the call before, (x, branch, gate). It is saved in place of x, so that of two
            calls in a row one keeps its stream: the backward pass makes x again, to the bit.

    Raises:
        ValueError: shapes, dtypes or devices do not go together.

    Differentiable in all tensors but those of ``source``; it has no second derivative. Moves, an element: x + branch +
    x' + y forward; backward dx' + dy + x + branch + dx + dbranch, and the branch of ``source``.
    """
    check_tokens(_OP, "x", x)
    check_tensor(_OP, "branch", branch, x.shape, FLOATS, x.device)
    shift, scale, offset = modulation(_OP, x, shift, scale, weight, bias)
    gate = _checked_gate(x, gate, scale)
    dtype = output_dtype(_OP, x, dtype)
    if reference_needed():
        return residual_ada_layer_norm_reference(x, branch, gate, shift, scale, offset=offset, eps=eps, dtype=dtype)
    x, branch = x.contiguous(), branch.contiguous()
    before: tuple[Tensor, Tensor | None, Tensor | None] = x, None, None
    if source is not None and not torch.compiler.is_compiling():  # a compiler decides for itself what to keep
        before = _plain(source, x, scale)
    before_x, before_branch, before_gate = before
    found = _op(
        x=x,
        branch=branch,
        gate=gate,
        shift=shift,
        scale=scale,
        before_x=before_x,
        before_branch=before_branch,
        before_gate=before_gate,
        offset=offset,
        eps=eps,
        dtype=dtype,
        keep=True,
    )
    return found.x_out, found.y


@torch.no_grad()
def rebuild_normalized(
    made_of: Branch,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype,
) -> Tensor:
    """The y of :func:`residual_ada_layer_norm` once more, to the bit, without x' and without gradient.

    Moves, an element: x + branch + y.
    """
    shift, scale, offset = modulation(_OP, made_of.x, shift, scale, weight, bias)
    x, branch, gate = _plain(made_of, made_of.x, scale)
    return _op(
        x=x,
        branch=branch,
        gate=gate,
        shift=shift,
        scale=scale,
        before_x=x,
        before_branch=None,
        before_gate=None,
        offset=offset,
        eps=eps,
        dtype=dtype,
        keep=False,
    ).y


def residual_ada_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    offset: float = 1.0,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 or wider; y is that of the rounded x'."""
    x_out = _joined(x, branch, gate)
    return x_out, ada_layer_norm_reference(x_out, shift, scale, offset=offset, eps=eps, dtype=dtype)


def _joined(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if gate is None:
        return (x.to(wide) + branch.to(wide)).to(x.dtype)
    return torch.addcmul(x.to(wide), gate.to(wide)[:, None], branch.to(wide)).to(x.dtype)


def _plain(source: Branch, x: Tensor, scale: Tensor) -> Branch:
    """What x was made of, as kernels take it, without gradient."""
    check_tensor(_OP, "source.x", source.x, x.shape, (x.dtype,), x.device)
    check_tensor(_OP, "source.branch", source.branch, x.shape, FLOATS, x.device)
    gate = _checked_gate(x, source.gate, scale)
    detached = None if gate is None else gate.detach()
    return Branch(source.x.detach().contiguous(), source.branch.detach().contiguous(), detached)


def _checked_gate(x: Tensor, gate: Tensor | None, scale: Tensor) -> Tensor | None:
    if gate is None:
        return None
    check_tensor(_OP, "gate", gate, (x.shape[0], x.shape[2]), (scale.dtype,), x.device)
    return gate if gate.stride(1) == 1 else gate.contiguous()


class _Normalized(NamedTuple):
    x_out: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor


class _Gradients(NamedTuple):
    dx: Tensor
    dbranch: Tensor
    dgate: Tensor
    dshift: Tensor
    dscale: Tensor


def _forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    before_x: Tensor,
    before_branch: Tensor | None,
    before_gate: Tensor | None,
    offset: float,
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> _Normalized:
    """``before_x`` is saved for the backward pass: x, or what x is computed from with the other two."""
    x_out = _joined(x, branch, gate)
    return _Normalized(x_out if keep else x.new_empty(0), *normalized(x_out, shift, scale, offset, eps, dtype))


def _empty(x: Tensor, dtype: torch.dtype, keep: bool, **_: Any) -> _Normalized:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return _Normalized(torch.empty_like(x) if keep else x.new_empty(0), y, statistics(x), statistics(x))


def _backward(
    dx_out: Tensor | None,
    dy: Tensor,
    before_x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    before_branch: Tensor | None,
    before_gate: Tensor | None,
    scale: Tensor,
    offset: float,
    mean: Tensor,
    rstd: Tensor,
) -> _Gradients:
    x = before_x if before_branch is None else _joined(before_x, before_branch, before_gate)
    dx, dshift, dscale = normalized_backward(dy, _joined(x, branch, gate), scale, offset, mean, rstd)
    if dx_out is not None:
        dx += dx_out
    if gate is None:
        none = dshift.new_empty(0)
        return _Gradients(dx.to(x.dtype), dx.to(branch.dtype, copy=True), none, dshift, dscale)
    dgate = (dx * branch).sum(1)
    dbranch = dx * gate.float()[:, None]
    return _Gradients(dx.to(x.dtype), dbranch.to(branch.dtype), dgate, dshift, dscale)


def _backward_empty(before_x: Tensor, branch: Tensor, gate: Tensor | None, **_: Any) -> _Gradients:
    dgate = statistics(before_x).new_empty(0) if gate is None else sums(before_x)
    dx, dbranch = torch.empty_like(before_x), torch.empty_like(branch)
    return _Gradients(dx, dbranch, dgate, sums(before_x), sums(before_x))


_op = Op(
    _OP,
    Pass(_forward, _empty),
    backward=Pass(_backward, _backward_empty),
    backends=(Triton(),),
)
