"""grad_norm: the norm of all gradients together, the same bits every time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from erd_fast.ops.checks import check_dense, check_device
from erd_fast.ops.declare import Outputs, Pass, declare
from erd_fast.ops.tensor_table import CHUNK, FORMATS, Column, Slot, TensorTable


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
        ValueError: gradients are on several devices, or not dense, or the table is of others.

    Reads each gradient once: 2 or 4 bytes an element.
    """
    if not gradients:
        return torch.zeros(())
    if table is None:
        check_device("grad_norm", **{f"gradients[{number}]": gradient for number, gradient in enumerate(gradients)})
        for number, gradient in enumerate(gradients):
            check_dense("grad_norm", f"gradients[{number}]", gradient)
        table = TensorTable(gradients[0].device)
        table.update([Slot(gradient) for gradient in gradients])
    else:
        table.check("grad_norm", Column.GRADIENT, gradients)
    return _op(table.rows, table.places, CHUNK, list(gradients))[0]


def grad_norm_reference(gradients: Sequence[Tensor]) -> Tensor:
    """The definition of :func:`grad_norm`."""
    dtype = _dtype(gradients)
    squares = [gradient.to(dtype).square().sum() for gradient in gradients]
    return torch.stack(squares).double().sum().sqrt().to(dtype)


def _dtype(gradients: Sequence[Tensor]) -> torch.dtype:
    double = any(gradient.dtype == torch.float64 for gradient in gradients)
    return torch.float64 if double else torch.float32


def _body(rows: Tensor, places: Tensor, chunk: int, gradients: list[Tensor]) -> Outputs:
    return grad_norm_reference(gradients), gradients[0].new_empty(0)


def _outputs(rows: Tensor, places: Tensor, chunk: int, gradients: list[Tensor]) -> Outputs:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=_dtype(gradients), device=rows.device)

    return empty(), empty(len(places))


def _launch(kernel: Callable[..., None], inputs: tuple[Any, ...], outputs: Outputs) -> None:
    kernel(*inputs[:3], *outputs)


def _reason_against(*flat: Any) -> str | None:
    return None if all(gradient.dtype in FORMATS for gradient in flat[3]) else "the norm of float64 is PyTorch's"


_op = declare(
    "grad_norm",
    Pass(
        "(Tensor rows, Tensor places, int chunk, Tensor[] gradients) -> (Tensor, Tensor)",
        _body,
        _outputs,
        _launch,
        dict.fromkeys(("cuda", "triton", "cpu"), _reason_against),
    ),
    backends=("cuda", "triton", "cpu"),
)
