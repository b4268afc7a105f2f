"""linear_gelu: the first layer of an MLP with its GELU, and the whole MLP, with GELU in the GEMM's epilogue."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.ops.checks import autocast_dtype, check_dtype, check_shape, check_tensor
from erd_fast.ops.core.backend import Backend, Extension, Triton
from erd_fast.ops.core.op import Op, Pass, dispatched, reference_needed

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FORMS = ("tanh", "none")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str = "tanh") -> Tensor:
    """GELU(x W^T + b).

    GELU(z) is z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) with ``approximate="tanh"`` (DiT), or z/2 (1 + erf(z /
    sqrt(2))) with ``"none"`` (U-ViT). The product accumulates and GELU is computed in float32. The backward pass keeps
    x and z = x W^T + b, the latter in the dtype of x.

    Args:
        x: (..., K), float32, bfloat16 or float16. Under autocast x, weight and bias are cast to its dtype.
        weight: (H, K), of x's dtype.
        bias: (H,), of x's dtype.
        approximate: "tanh" or "none".

    Returns:
        (..., H), of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, there is no row, or the form of GELU is unknown.

    Moves, besides the GEMM's own reading and the activation, 1 number for each of M H elements: z. The backward pass
    reads z and the activation's gradient and writes z's.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
    """
    _check_layer("linear_gelu", x, weight, bias, approximate)
    x, weight, bias = _cast("linear_gelu", ("x", "weight", "bias"), (x, weight, bias))
    if reference_needed():
        return linear_gelu_reference(x, weight, bias, approximate=approximate)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    found = _op(x=flat, weight=weight.contiguous(), bias=bias.contiguous(), approximate=approximate)
    return found.activation.view(*x.shape[:-1], -1)


def gelu_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    *,
    approximate: str = "tanh",
    recompute: bool | None = None,
) -> Tensor:
    """GELU(x W^T + b) V^T + c, an MLP of two layers, as one node of autograd.

    In the backward pass the second layer's input gradient, GELU's derivative and the gradient of b come from one GEMM.
    Kept for it are x and z = x W^T + b; see :func:`linear_gelu` for z, GELU and its two forms.

    Args:
        x: (..., K), float32, bfloat16 or float16. Under autocast x, weights and biases are cast to its dtype.
        weight, bias: W (H, K) and b (H,), of x's dtype.
        next_weight, next_bias: V (D, H) and c (D,), of x's dtype.
        approximate: "tanh" or "none".
        recompute: whether the backward pass computes the activation again from z instead of keeping it: M H numbers
            less in memory for one pass over them. None does so on CUDA alone.

    Returns:
        (..., D), of x's dtype.

    Raises:
        ValueError: as :func:`linear_gelu`.

    Moves, for M rows, besides what the GEMMs read and their M D outputs, in units of M H numbers: forward, z and the
    activation once out; backward, z once in, its gradient once out, and with ``recompute`` the activation once out.
    """
    _check_layer("gelu_mlp", x, weight, bias, approximate)
    if next_weight.dim() != 2 or not next_weight.shape[0] or next_weight.shape[1] != weight.shape[0]:
        raise ValueError(
            f"gelu_mlp: next_weight: given shape {tuple(next_weight.shape)}, allowed (D, {weight.shape[0]})"
        )
    check_shape("gelu_mlp", "next_bias", next_bias, (next_weight.shape[0],))
    names = ("x", "weight", "bias", "next_weight", "next_bias")
    tensors = _cast("gelu_mlp", names, (x, weight, bias, next_weight, next_bias))
    if reference_needed():
        return gelu_mlp_reference(*tensors, approximate=approximate)
    if torch.compiler.is_compiling() or dispatched(*tensors):
        return F.linear(linear_gelu(*tensors[:3], approximate=approximate), *tensors[3:])
    x, *parameters = [tensor.contiguous() for tensor in tensors]
    again = x.is_cuda if recompute is None else recompute
    args = _first_layer(x, parameters[0], parameters[1], approximate)

    def whole(backend: Backend) -> None:
        """The MLP forward and backward, which is what an autotuner times."""
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
        with torch.enable_grad():
            y = _GeluMlp.apply(*leaves, approximate, again, backend)
        torch.autograd.grad(y, leaves, y.detach())

    backend = _op.choose(args, call=whole)
    if torch.is_grad_enabled():
        return _GeluMlp.apply(x, *parameters, approximate, again, backend)
    activation = _op.run(_op.forward, backend, args).activation
    return _second_layer(x, activation, *parameters[2:])


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str = "tanh") -> Tensor:
    """The definition of :func:`linear_gelu`, in float32 (float64 if x is); autograd defines the gradients."""
    with torch.autocast(x.device.type, enabled=False):
        return _wide_activation(x, weight, bias, approximate).to(x.dtype)


def gelu_mlp_reference(
    x: Tensor, weight: Tensor, bias: Tensor, next_weight: Tensor, next_bias: Tensor, *, approximate: str = "tanh"
) -> Tensor:
    """The definition of :func:`gelu_mlp`, in float32 (float64 if x is); autograd defines the gradients."""
    with torch.autocast(x.device.type, enabled=False):
        activation = _wide_activation(x, weight, bias, approximate)
        return (activation @ next_weight.to(activation.dtype).t() + next_bias).to(x.dtype)


def _wide_activation(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) @ weight.to(wide).t() + bias, approximate=approximate)


def _check_layer(op: str, x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> None:
    if approximate not in _FORMS:
        raise ValueError(f"{op}: approximate: given {approximate!r}, allowed {' or '.join(map(repr, _FORMS))}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"{op}: weight: given shape {tuple(weight.shape)}, allowed (H, K)")
    if not x.dim() or not x.numel() or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x: given shape {tuple(x.shape)}, allowed (..., {weight.shape[1]}) with one row or more"
        )
    check_shape(op, "bias", bias, (weight.shape[0],))


def _cast(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, of the first one's dtype and device; under autocast in its dtype."""
    x, dtype = tensors[0], autocast_dtype(tensors[0])
    check_dtype(op, names[0], x, *_FLOATS)
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        allowed = (x.dtype,) if dtype is None else _FLOATS
        for name, tensor in zip(names, tensors, strict=True):
            check_tensor(op, name, tensor, tensor.shape, allowed, x.device)
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def _first_layer(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> dict[str, Any]:
    return {"x": x.view(-1, x.shape[-1]), "weight": weight, "bias": bias, "approximate": approximate}


def _second_layer(x: Tensor, activation: Tensor, next_weight: Tensor, next_bias: Tensor) -> Tensor:
    return torch.addmm(next_bias, activation, next_weight.t()).view(*x.shape[:-1], -1)


class _GeluMlp(torch.autograd.Function):
    """x is kept as it was given: a hook of saved tensors may know it and build it again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        next_weight: Tensor,
        next_bias: Tensor,
        approximate: str,
        recompute: bool,
        backend: Backend,
    ) -> Tensor:
        activation, pre = _op.run(_op.forward, backend, _first_layer(x, weight, bias, approximate))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, weight, next_weight, pre, None if recompute else activation)
        del pre  # not to outlive the product below where nobody needs it
        ctx.approximate, ctx.backend = approximate, backend.name
        return _second_layer(x, activation, next_weight, next_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("gelu_mlp: double backward (create_graph) is not supported; use gelu_mlp_reference")
        x, weight, next_weight, pre, activation = ctx.saved_tensors
        needs_x, needs_weight, _, needs_next_weight, needs_next_bias = ctx.needs_input_grad[:5]
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        again = needs_next_weight and activation is None
        first, second = dy, next_weight
        if ctx.backend == "cuda" and _misfit(dy, next_weight):
            first, second = dy @ next_weight, None
        dpre, dbias, computed = _op.differentiate(
            ctx.backend, dy=first, next_weight=second, pre=pre, approximate=ctx.approximate, recompute=again
        )
        dnext_weight = dy.t() @ (computed if again else activation) if needs_next_weight else None
        del computed, first
        dweight = dpre.t() @ x.view(-1, x.shape[-1]) if needs_weight else None
        dx = (dpre @ weight).view(x.shape) if needs_x else None
        dnext_bias = dy.sum(0) if needs_next_bias else None
        return dx, dweight, dbias.to(weight.dtype), dnext_weight, dnext_bias, None, None, None


class _Activation(NamedTuple):
    activation: Tensor
    pre: Tensor


class _Gradients(NamedTuple):
    dpre: Tensor
    dbias: Tensor
    activation: Tensor


def _forward(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> _Activation:
    pre = torch.addmm(bias, x, weight.t())
    return _Activation(F.gelu(pre, approximate=approximate), pre)


def _empty(x: Tensor, weight: Tensor, **_: Any) -> _Activation:
    shape = (x.shape[0], weight.shape[0])
    return _Activation(x.new_empty(shape), x.new_empty(shape))


def _backward(dy: Tensor, next_weight: Tensor | None, pre: Tensor, approximate: str, recompute: bool) -> _Gradients:
    """``dy`` is the gradient of the activation, or with ``next_weight`` that of the second layer's output."""
    if next_weight is None:
        dpre = torch.ops.aten.gelu_backward(dy, pre, approximate=approximate)
    else:
        dpre = dy @ next_weight
        torch.ops.aten.gelu_backward.grad_input(dpre, pre, approximate=approximate, grad_input=dpre)
    activation = F.gelu(pre, approximate=approximate) if recompute else pre.new_empty(0)
    return _Gradients(dpre, dpre.sum(0, dtype=torch.float32), activation)


def _backward_empty(pre: Tensor, recompute: bool, **_: Any) -> _Gradients:
    activation = torch.empty_like(pre) if recompute else pre.new_empty(0)
    return _Gradients(torch.empty_like(pre), pre.new_empty(pre.shape[1], dtype=torch.float32), activation)


def _misfit(*matrices: Tensor) -> str | None:
    """What of these matrices cuBLASLt's epilogues cannot take: they move 16 bytes at a time."""
    for matrix in matrices:
        if matrix.shape[-1] % 8:
            return f"its epilogues take rows of a multiple of 8 numbers, and one here has {matrix.shape[-1]}"
        if matrix.storage_offset() * matrix.element_size() % 16:
            return "its epilogues take tensors that begin at a multiple of 16 bytes, and one here does not"
    return None


def _cuda_rule(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> str | None:
    if approximate != "tanh":
        return "cuBLASLt's epilogues have GELU only in its tanh form"
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "it multiplies float32 in float32, and TF32 is set"
    return _misfit(x, weight, bias)


def _gradient(
    dactivation: Tensor, x: Tensor, weight: Tensor, pre: Tensor, approximate: str, backend: str, needs: list[str]
) -> dict[str, Tensor]:
    found = _op.differentiate(
        backend, dy=dactivation, next_weight=None, pre=pre, approximate=approximate, recompute=False
    )
    gradients = {"bias": found.dbias}
    if "x" in needs:
        gradients["x"] = found.dpre @ weight
    if "weight" in needs:
        gradients["weight"] = found.dpre.t() @ x
    return gradients


_op = Op(
    "linear_gelu",
    Pass(_forward, _empty),
    backward=Pass(_backward, _backward_empty),
    gradient=_gradient,
    backends=(Extension("cuda", _cuda_rule), Triton()),
    timed=True,
)
