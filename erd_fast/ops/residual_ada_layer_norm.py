"""residual_ada_layer_norm: a branch joins the residual stream and the next one gets its normalised input: one pass."""

from collections.abc import Callable
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
from erd_fast.ops.checks import check_device, check_dtype, check_shape
from erd_fast.ops.declare import Gradient, Outputs, Pass, declare, reference_needed

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
    check_tokens(_OP, "branch", branch)
    check_shape(_OP, "branch", branch, tuple(x.shape))
    check_device(_OP, x=x, branch=branch, gate=gate)
    shift, scale, offset = modulation(_OP, x, shift, scale, weight, bias)
    gate = _checked_gate(x, gate, scale)
    dtype = output_dtype(_OP, x, dtype)
    if reference_needed():
        return residual_ada_layer_norm_reference(x, branch, gate, shift, scale, offset=offset, eps=eps, dtype=dtype)
    made_of: Branch | tuple[None, None, None] = (None, None, None)
    if source is not None and not torch.compiler.is_compiling():  # a compiler decides for itself what to keep
        made_of = _plain(source, x, scale)
    flat = (x.contiguous(), branch.contiguous(), gate, shift, scale, *made_of, offset, eps, dtype, True)
    x_out, y, *_ = _op(*flat)
    return x_out, y


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
    made_of = _plain(made_of, made_of.x, scale)
    return _op(*made_of, shift, scale, None, None, None, offset, eps, dtype, False)[1]


def residual_ada_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    offset: float,
    eps: float,
    dtype: torch.dtype,
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
    for name, given in {"x": source.x, "branch": source.branch}.items():
        check_shape(_OP, f"source.{name}", given, tuple(x.shape))
    check_dtype(_OP, "source.x", source.x, x.dtype)
    check_dtype(_OP, "source.branch", source.branch, *FLOATS)
    check_device(_OP, x=x, source_x=source.x, source_branch=source.branch, source_gate=source.gate)
    gate = _checked_gate(x, source.gate, scale)
    detached = None if gate is None else gate.detach()
    return Branch(source.x.detach().contiguous(), source.branch.detach().contiguous(), detached)


def _checked_gate(x: Tensor, gate: Tensor | None, scale: Tensor) -> Tensor | None:
    if gate is None:
        return None
    check_shape(_OP, "gate", gate, (x.shape[0], x.shape[2]))
    check_dtype(_OP, "gate", gate, scale.dtype)
    return gate if gate.stride(1) == 1 else gate.contiguous()


_SCHEMA = (
    "(Tensor x, Tensor branch, Tensor? gate, Tensor shift, Tensor scale, Tensor? source_x, Tensor? source_branch, "
    "Tensor? source_gate, float offset, float eps, ScalarType dtype, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? dx_out, Tensor dy, Tensor x, Tensor branch, Tensor? gate, Tensor? before_branch, Tensor? before_gate, "
    "Tensor scale, float offset, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _body(x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, *flat: Any) -> Outputs:
    *_, offset, eps, dtype, keep = flat
    x_out = _joined(x, branch, gate)
    y, mean, rstd = normalized(x_out, shift, scale, offset, eps, dtype)
    return x_out if keep else x.new_empty(0), y, mean, rstd


def _outputs(x: Tensor, *flat: Any) -> Outputs:
    dtype, keep = flat[-2:]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.empty_like(x) if keep else x.new_empty(0), y, statistics(x), statistics(x)


def _launch(kernel: Callable[..., None], inputs: tuple[Any, ...], outputs: Outputs) -> None:
    *_, offset, eps, _, keep = inputs
    x_out, *rest = outputs
    kernel(*inputs[:5], offset, eps, x_out if keep else None, *rest)


def _backward_body(
    dx_out: Tensor | None,
    dy: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    before_branch: Tensor | None,
    before_gate: Tensor | None,
    scale: Tensor,
    *flat: Any,
) -> Outputs:
    if before_branch is not None:
        x = _joined(x, before_branch, before_gate)
    dx, dshift, dscale = normalized_backward(dy, _joined(x, branch, gate), scale, *flat)
    if dx_out is not None:
        dx += dx_out
    if gate is None:
        return dx.to(x.dtype), dx.to(branch.dtype, copy=True), dshift.new_empty(0), dshift, dscale
    dgate = (dx * branch).sum(1)
    dbranch = dx * gate.float()[:, None]
    return dx.to(x.dtype), dbranch.to(branch.dtype), dgate, dshift, dscale


def _backward_outputs(dx_out: Any, dy: Any, x: Tensor, branch: Tensor, gate: Tensor | None, *flat: Any) -> Outputs:
    dgate = statistics(x).new_empty(0) if gate is None else sums(x)
    return torch.empty_like(x), torch.empty_like(branch), dgate, sums(x), sums(x)


def _launch_backward(kernel: Callable[..., None], inputs: tuple[Any, ...], outputs: Outputs) -> None:
    dx, dbranch, dgate, dshift, dscale = outputs
    kernel(*inputs, dx, dbranch, dgate if inputs[4] is not None else None, dshift, dscale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, branch, gate, _, scale, source_x, source_branch, source_gate, ctx.offset, _, ctx.dtype, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    stream = x if source_x is None else source_x
    ctx.save_for_backward(stream, branch, gate, source_branch, source_gate, scale, *output[2:])


def _backward(ctx: Any, dx_out: Tensor | None, dy: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    x, branch, gate, before_branch, before_gate, scale, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(x.shape, dtype=ctx.dtype, device=x.device)
    gradients = _op.differentiate(
        None if dx_out is None else dx_out.contiguous(),
        dy.contiguous(),
        x,
        branch,
        gate,
        before_branch,
        before_gate,
        scale,
        ctx.offset,
        mean,
        rstd,
        backend=ctx.backend,
    )
    dx, dbranch, dgate, dshift, dscale = gradients
    of_gate = None if gate is None else dgate.to(gate.dtype)
    return dx, dbranch, of_gate, dshift.to(scale.dtype), dscale.to(scale.dtype), *([None] * 7)


_op = declare(
    _OP,
    Pass(_SCHEMA, _body, _outputs, _launch),
    backward=Pass(_BACKWARD_SCHEMA, _backward_body, _backward_outputs, _launch_backward),
    gradient=Gradient(_setup_context, _backward),
    backends=("triton",),
)
