"""grad_norm: the norm of all gradients together, the same bits every time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erd_fast.ops.checks import check_device
from erd_fast.ops.core.backend import Extension, Triton
from erd_fast.ops.core.op import Op, Pass, reference_needed
from erd_fast.ops.tensor_table import CHUNK, FORMATS, Column, Slot, TensorTable, check_floating, check_plain


def grad_norm(gradients: Sequence[Tensor], table: TensorTable | None = None) -> Tensor:
    """sqrt(sum of g^2 over all elements of all gradients).

    Squares are summed in float32 within chunks of 8,192 elements and in float64 over the chunks, in one order: the
    result is the same bits for the same gradients, and infinite or NaN if one of them is, or if a sum of squares leaves
    float32.

    Args:
        gradients: any shapes of dense memory; float32, bfloat16 and float16 may be mixed. float64 is left to PyTorch,
            and so is the sum then.
        table: that of these gradients, if there is one already.

    Returns:
        () float32 (float64 if a gradient is), on the device of the gradients; 0 for none.

    Raises:
        ValueError: gradients are on several devices, not dense, or not floating point, or the table is of others.

    Reads each gradient once: 2 or 4 bytes an element.
    """
    if not gradients:
        return torch.zeros(())
    if table is None:
        for number, gradient in enumerate(gradients):
            check_plain(f"grad_norm: gradients[{number}]", gradient)
            check_floating(f"grad_norm: gradients[{number}]", gradient)
        check_device("grad_norm", **{f"gradients[{number}]": gradient for number, gradient in enumerate(gradients)})
    if reference_needed(*gradients):
        return grad_norm_reference(gradients)
    if table is None:
        table = TensorTable(gradients[0].device)
        table.update([Slot(gradient) for gradient in gradients], "grad_norm")
    else:
        table.check("grad_norm", Column.GRADIENT, gradients)
    return _op(rows=table.rows, places=table.places, chunk=CHUNK, gradients=list(gradients)).norm


def grad_norm_reference(gradients: Sequence[Tensor]) -> Tensor:
    """The definition of :func:`grad_norm`."""
    dtype = _dtype(gradients)
    squares = [gradient.to(dtype).square().sum() for gradient in gradients]
    return torch.stack(squares).double().sum().sqrt().to(dtype)


def _dtype(gradients: Sequence[Tensor]) -> torch.dtype:
    double = any(gradient.dtype == torch.float64 for gradient in gradients)
    return torch.float64 if double else torch.float32


class _Norm(NamedTuple):
    norm: Tensor
    partials: Tensor  # sums of squares by chunk


def _forward(rows: Tensor, places: Tensor, chunk: int, gradients: list[Tensor]) -> _Norm:
    return _Norm(grad_norm_reference(gradients), gradients[0].new_empty(0))


def _empty(places: Tensor, gradients: list[Tensor], **_: Any) -> _Norm:
    dtype = _dtype(gradients)
    return _Norm(places.new_empty((), dtype=dtype), places.new_empty(len(places), dtype=dtype))


def _rule(gradients: list[Tensor], **_: Any) -> str | None:
    return None if all(gradient.dtype in FORMATS for gradient in gradients) else "the norm of float64 is PyTorch's"


_op = Op(
    "grad_norm",
    Pass(_forward, _empty),
    backends=(Extension("cuda", _rule), Triton(_rule), Extension("cpu", _rule)),
)
