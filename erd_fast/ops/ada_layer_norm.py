"""ada_layer_norm: LayerNorm without parameters of its own, then a scale and a shift for each sample."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from erd_fast.ops.checks import autocast_dtype, check_dtype, check_tensor
from erd_fast.ops.core.backend import Triton
from erd_fast.ops.core.op import Op, Pass, reference_needed

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192


def ada_layer_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = (1 + scale) xhat + shift, or weight xhat + bias, with xhat = (x - mean) / sqrt(var + eps) over the last
    dimension; in float32, rounded once (Peebles & Xie, arXiv 2212.09748, section 3.2; docs/math.md E1).

    Args:
        x: (N, T, D), float32, bfloat16 or float16; D up to 8192.
        shift, scale: (N, D), one of each sample, chunks of a larger projection too; None is 0.
        weight, bias: (D,), of an ordinary LayerNorm in place of those; None is 1 and 0.
        eps: added to the (biased) variance.
        dtype: of y; None is that of autocast where it is on, else x's.

    Raises:
        ValueError: shapes, dtypes or devices do not go together.

    Differentiable in all tensors; it has no second derivative. Moves, an element: x + y forward; backward dy + x + dx,
    and four bytes a token for each of mean and rstd.
    """
    check_tokens("ada_layer_norm", "x", x)
    shift, scale, offset = modulation("ada_layer_norm", x, shift, scale, weight, bias)
    dtype = output_dtype("ada_layer_norm", x, dtype)
    if reference_needed():
        return ada_layer_norm_reference(x, shift, scale, offset=offset, eps=eps, dtype=dtype)
    return _op(x=x.contiguous(), shift=shift, scale=scale, offset=offset, eps=eps, dtype=dtype).y


def ada_layer_norm_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    offset: float = 1.0,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition: (offset + scale) xhat + shift, in float32 or wider. ``offset`` is 1 for a modulation, 0 where
    ``scale`` is a LayerNorm's weight; ``dtype`` None is x's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normal * (offset + scale.to(wide))[:, None] + shift.to(wide)[:, None]).to(dtype or x.dtype)


def check_tokens(op: str, argument: str, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is (N, T, D) of a dtype that kernels take, with at least one element."""
    if x.dim() != 3 or not x.numel() or x.shape[2] > WIDEST:
        raise ValueError(
            f"{op}: {argument}: given shape {tuple(x.shape)}, allowed (N, T, D) with N and T of 1 or more, "
            f"D of 1 to {WIDEST}"
        )
    if x.dtype not in FLOATS:
        check_dtype(op, argument, x, *FLOATS)


def modulation(
    op: str, x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """(shift, scale, offset) that do all of it: y = (offset + scale) xhat + shift, both (N, D) with a last stride of 1.
    A vector for all samples has a first stride of 0."""
    samples, _, width = x.shape
    offset, names = 1.0, ("shift", "scale")
    shape: tuple[int, ...] = samples, width
    if weight is not None or bias is not None:
        if shift is not None or scale is not None:
            names = ("weight" if bias is None else "bias", "scale" if shift is None else "shift")
            raise ValueError(f"{op}: {names[0]} must not be given together with {names[1]}")
        offset, names, shape = 1.0 if weight is None else 0.0, ("bias", "weight"), (width,)
        shift, scale = bias, weight
    device, dtypes = x.device, FLOATS if shift is None else (shift.dtype,)
    check_tensor(op, names[0], shift, shape, FLOATS, device)
    check_tensor(op, names[1], scale, shape, dtypes, device)
    if shift is None or scale is None:
        other = scale if shift is None else shift
        zero = torch.zeros(width, dtype=torch.float32 if other is None else other.dtype, device=x.device)
        shift, scale = zero if shift is None else shift, zero if scale is None else scale
    return _rows(shift, samples), _rows(scale, samples), offset


def _rows(vector: Tensor, samples: int) -> Tensor:
    rows = vector.expand(samples, -1) if vector.dim() == 1 else vector
    return rows if rows.stride(1) == 1 else rows.contiguous()


def output_dtype(op: str, x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of y: what was asked for, autocast's where it is on, else x's."""
    if dtype is None:
        return autocast_dtype(x) or x.dtype
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype: given {dtype}, allowed {', '.join(map(str, FLOATS))}")
    return dtype


class Normalized(NamedTuple):
    """y, and the mean and 1 / sqrt(var + eps) of each token, (N, T, 1) float32."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class _Gradients(NamedTuple):
    dx: Tensor
    dshift: Tensor
    dscale: Tensor


def normalized(x: Tensor, shift: Tensor, scale: Tensor, offset: float, eps: float, dtype: torch.dtype) -> Normalized:
    """y, mean and rstd in PyTorch."""
    normal, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)
    factor = scale.float().add(offset) if offset else scale.float()
    y = torch.addcmul(shift.float().unsqueeze(1), normal, factor.unsqueeze(1), out=normal)
    return Normalized(y if dtype == torch.float32 else y.to(dtype), mean, rstd)


def normalized_backward(
    dy: Tensor, x: Tensor, scale: Tensor, offset: float, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale) in PyTorch, float32."""
    x, dy = x.float(), dy.float()
    dnormal = dy * (offset + scale.float())[:, None]
    none = (True, False, False)
    dx = torch.ops.aten.native_layer_norm_backward(dnormal, x, x.shape[-1:], mean, rstd, None, None, none)[0]
    normal = torch.sub(x, mean, out=dnormal).mul_(rstd).mul_(dy)
    return dx, dy.sum(1), normal.sum(1)


def statistics(x: Tensor) -> Tensor:
    """Room for a number of each token."""
    return torch.empty((*x.shape[:2], 1), dtype=torch.float32, device=x.device)


def sums(x: Tensor) -> Tensor:
    """Room for a gradient of each sample's modulation."""
    return torch.empty((x.shape[0], x.shape[2]), dtype=torch.float32, device=x.device)


def _empty(x: Tensor, dtype: torch.dtype, **_: Any) -> Normalized:
    return Normalized(torch.empty(x.shape, dtype=dtype, device=x.device), statistics(x), statistics(x))


def _backward(dy: Tensor, x: Tensor, scale: Tensor, offset: float, mean: Tensor, rstd: Tensor) -> _Gradients:
    dx, dshift, dscale = normalized_backward(dy, x, scale, offset, mean, rstd)
    return _Gradients(dx.to(x.dtype), dshift, dscale)


def _backward_empty(x: Tensor, **_: Any) -> _Gradients:
    return _Gradients(torch.empty_like(x), sums(x), sums(x))


_op = Op(
    "ada_layer_norm",
    Pass(normalized, _empty),
    backward=Pass(_backward, _backward_empty),
    backends=(Triton(),),
)
