"""attention: softmax(q k^T / sqrt(K)) v of every head, from packed q, k and v, by whichever kernel is the fastest."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from erd_fast.ops.availability import interpreted
from erd_fast.ops.checks import autocast_dtype, check_dtype
from erd_fast.ops.core.backend import External, Triton
from erd_fast.ops.core.op import Op, Pass, reference_needed
from erd_fast.ops.external_attention import EXTERNAL, HALVES, merge_heads, sdpa

_MOST_TOKENS = 512  # of our kernel
_HEAD_DIMS = range(16, 129, 8)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """out = softmax(q k^T / sqrt(K)) v for each sample and head, softmax in float32 (Vaswani et al., arXiv 1706.03762,
    section 3.2.1; docs/math.md L).

    Args:
        qkv: (N, T, 3 D) as one linear layer gives it: a token's q, then its k, then its v, each the heads' K values
            side by side, D = num_heads K; float32, bfloat16 or float16, under autocast cast to its dtype. Other layouts
            than the contiguous one are copied.
        num_heads: number of heads.

    Returns:
        (N, T, D) in the dtype of ``qkv``, heads side by side.

    Raises:
        ValueError: a shape, a dtype or a number of heads that is not allowed.

    Nothing is transposed or copied on the way: q, k and v are views of ``qkv``, and its gradient is one (N, T, 3 D)
    tensor. Moves, times the size of an element: 3 T D in and T D out a sample, backward 5 T D in and 3 T D out; the
    T x T scores stay on the chip, but in ``reference``.

    Backends, in the order of ``auto``: PyTorch's own ``cudnn`` and ``flash``, flash-attention's packages where they are
    installed, PyTorch's ``efficient``, and our ``triton`` (T up to 512, K of 16 to 128). Where a run times them, the
    fastest for the form of ``qkv`` replaces the order. cuDNN is first on compute capability 9 and 10 and last on
    others, as in PyTorch itself; ``efficient`` stands before ``triton`` since what gets so far is float32, which runs
    on its tensor cores in three parts and on none of ours. On a CPU ``flash`` is PyTorch's kernel for CPUs. Within
    torch.compile, on the meta device and under a dispatch mode PyTorch's function runs, which those know, unless a
    backend was asked for by name; a graph keeps that name.

    No second derivative, but in ``reference``.
    """
    _check(qkv, num_heads)
    if (dtype := autocast_dtype(qkv)) is not None:
        qkv = qkv.to(dtype)
    if reference_needed():
        return attention_reference(qkv, num_heads)
    return _op(qkv=qkv.contiguous(), num_heads=num_heads).out


def attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """The definition, differentiable to any order, in float32 or wider: (N, T, 3 D) to (N, T, D)."""
    q, k, v = _wide(qkv, num_heads)
    with _exact(qkv):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = scores.softmax(-1) @ v
    return merge_heads(out).to(qkv.dtype)


def _check(qkv: Tensor, num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"attention: num_heads: given {num_heads}, allowed 1 or more")
    if qkv.dim() != 3 or not qkv.numel() or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv: given shape {tuple(qkv.shape)}, allowed (N, T, 3 D) with N and T of 1 or more and D a "
            f"multiple of the {num_heads} heads"
        )
    check_dtype("attention", "qkv", qkv, torch.float32, *HALVES)


def _wide(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k and v (N, H, T, K) in float32, or wider if they are."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    n, t, row = qkv.shape
    heads = qkv.to(wide).reshape(n, t, 3, num_heads, row // (3 * num_heads)).unbind(2)
    return tuple(head.transpose(1, 2) for head in heads)


def _exact(qkv: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast does not make matrix products narrower."""
    return contextlib.nullcontext() if autocast_dtype(qkv) is None else torch.autocast(qkv.device.type, enabled=False)


class _Attended(NamedTuple):
    out: Tensor
    lse: Tensor | None = None
    """(N, H, T) float32: logarithm of the softmax's denominator; other projects' functions keep it to themselves."""


class _Gradients(NamedTuple):
    dqkv: Tensor


def _forward(qkv: Tensor, num_heads: int) -> _Attended:
    q, k, v = _wide(qkv, num_heads)
    with _exact(qkv):
        scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
        lse = scores.logsumexp(-1)
        out = scores.sub_(lse[..., None]).exp_() @ v
    return _Attended(merge_heads(out).to(qkv.dtype), lse)


def _empty(qkv: Tensor, num_heads: int) -> _Attended:
    n, t, row = qkv.shape
    return _Attended(qkv.new_empty((n, t, row // 3)), qkv.new_empty((n, num_heads, t), dtype=torch.float32))


def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> _Gradients:
    q, k, v = _wide(qkv, num_heads)
    n, h, t, width = q.shape
    dout, out = (tensor.float().view(n, t, h, width).transpose(1, 2) for tensor in (dout, out))
    scale = width**-0.5
    with _exact(qkv):
        weight = (q @ k.transpose(-1, -2)).mul_(scale).sub_(lse[..., None]).exp_()
        dv = weight.transpose(-1, -2) @ dout
        dscores = (dout @ v.transpose(-1, -2)).sub_((dout * out).sum(-1, keepdim=True)).mul_(weight).mul_(scale)
        dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
    dqkv = torch.stack([gradient.transpose(1, 2).to(qkv.dtype) for gradient in (dq, dk, dv)], 2)
    return _Gradients(dqkv.view(qkv.shape))


def _backward_empty(qkv: Tensor, **_: Any) -> _Gradients:
    return _Gradients(torch.empty_like(qkv))


def _triton_rule(qkv: Tensor, num_heads: int) -> str | None:
    if qkv.shape[1] > _MOST_TOKENS:
        return f"it takes up to {_MOST_TOKENS} tokens, and these are {qkv.shape[1]}"
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim not in _HEAD_DIMS:
        return f"it takes K of 16 to 128 that are multiples of 8, and this is {head_dim}"
    if qkv.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter has no product of bfloat16"
    return None


_op = Op(
    "attention",
    Pass(_forward, _empty),
    backward=Pass(_backward, _backward_empty),
    backends=(*EXTERNAL, Triton(_triton_rule)),
    timed=True,
    traced=External("sdpa", sdpa, device=""),
)


@register_flop_formula(torch.ops.erd_fast.attention_fwd)
def _flops(qkv_shape: Any, num_heads: int, *unused: Any, **how: Any) -> int:
    n, t, row = qkv_shape
    return 4 * n * t * t * (row // 3)


@register_flop_formula(torch.ops.erd_fast.attention_bwd)
def _backward_flops(dout_shape: Any, *unused: Any, **how: Any) -> int:
    n, t, width = dout_shape
    return 10 * n * t * t * width
