"""ada_layer_norm: LayerNorm of tokens, modulated by their sample: residual_ada_layer_norm without a branch.

The kernels are that file's, compiled without what is not there.
"""

from torch import Tensor

from . import residual_ada_layer_norm


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    offset: float,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fill y, and mean and rstd for the backward pass.

    Args:
        x: (N, T, D) fp32, bf16 or fp16, contiguous; D up to 8192.
        shift, scale: (N, D) fp32, bf16 or fp16; rows may lie anywhere, columns side by side.
        offset: added to the scale. eps: added to the variance.
        y: (N, T, D) out, of any of the dtypes. mean, rstd: (N, T, 1) fp32 out.
    """
    residual_ada_layer_norm.forward(x, None, None, shift, scale, offset, eps, None, y, mean, rstd)


def backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: float,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dshift: Tensor,
    dscale: Tensor,
) -> None:
    """Fill dx, and dshift and dscale, which are sums over the tokens of a sample.

    Args:
        dy: (N, T, D) contiguous, of y's dtype. x, scale, offset, mean, rstd: as in the forward pass.
        dx: (N, T, D) out, of x's dtype. dshift, dscale: (N, D) fp32 out.
    """
    residual_ada_layer_norm.backward(
        None, dy, x, None, None, None, None, scale, offset, mean, rstd, dx, None, None, dshift, dscale
    )
