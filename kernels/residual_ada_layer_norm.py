"""residual_ada_layer_norm: a branch joins the residual stream, which is normalised and modulated, in one pass.

The kernels are those of ada_layer_norm.py, which has the formulas and says how they run and what they move.
"""

from torch import Tensor

from .ada_layer_norm import launch_backward, launch_forward


def forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    offset: float,
    eps: float,
    x_out: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fill x_out, y, and mean and rstd for the backward pass.

    Args:
        x: (N, T, D) fp32, bf16 or fp16, contiguous; D up to 8192.
        branch: (N, T, D) of any of the dtypes, contiguous.
        gate, shift, scale: (N, D) fp32, bf16 or fp16; rows may lie anywhere, columns side by side. No gate is 1.
        offset: added to the scale. eps: added to the variance.
        x_out: (N, T, D) out, of x's dtype; None where only y is wanted, which has the same bits.
        y: (N, T, D) out, of any of the dtypes. mean, rstd: (N, T) fp32 out.
    """
    launch_forward(x, branch, gate, shift, scale, offset, eps, x_out, y, mean, rstd)


def backward(
    dx_out: Tensor | None,
    dy: Tensor,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    before_branch: Tensor | None,
    before_gate: Tensor | None,
    scale: Tensor,
    offset: float,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dbranch: Tensor,
    dgate: Tensor | None,
    dshift: Tensor,
    dscale: Tensor,
) -> None:
    """Fill the gradients of x and branch, and those of gate, shift and scale, which are sums over a sample's tokens.

    Args:
        dx_out: (N, T, D) contiguous, of x's dtype; None is 0.
        dy: (N, T, D) contiguous, of y's dtype.
        x, branch, gate, scale, offset, mean, rstd: as in the forward pass, whose x_out is made again from them.
        before_branch, before_gate: given, they make the forward pass's x from the ``x`` given here in the same way.
        dx: (N, T, D) out, of x's dtype. dbranch: (N, T, D) out, of branch's dtype.
        dgate, dshift, dscale: (N, D) fp32 out; dgate may be None.
    """
    launch_backward(
        dx_out,
        dy,
        x,
        branch,
        gate,
        before_branch,
        before_gate,
        scale,
        offset,
        mean,
        rstd,
        dx,
        dbranch,
        dgate,
        dshift,
        dscale,
    )
