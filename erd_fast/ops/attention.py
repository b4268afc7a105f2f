"""attention: softmax(q k^T / sqrt(K)) v of every head, from packed q, k and v, by whichever kernel is the fastest."""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from erd_fast.ops.backends import asked_for, interpreted
from erd_fast.ops.checks import check_dtype
from erd_fast.ops.declare import Gradient, Library, Outputs, Pass, declare, dispatched, reference_needed

_HALVES = (torch.bfloat16, torch.float16)
_MOST_TOKENS = 512  # of our kernel
_HEAD_DIMS = range(16, 129, 8)
_CUDNN_READS_BEYOND = 91500  # up to this version it reads past the last token where T is no multiple of 128

BACKENDS = ("cudnn", "flash", "flash-attn-3", "flash-attn-2", "flash-attn-4", "efficient", "triton")


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
    if _in_autocast(qkv):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    if reference_needed():
        return attention_reference(qkv, num_heads)
    if torch.compiler.is_compiling() or qkv.is_meta or dispatched((qkv,)):
        named = asked_for("attention", _op.backends)
        if named not in ("triton", "reference"):
            return (_sdpa if named is None else _op.libraries[named].call)(qkv, num_heads)[0]
    return _op(qkv.contiguous(), num_heads)[0]


def attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """The definition, differentiable to any order, in float32 or wider: (N, T, 3 D) to (N, T, D)."""
    q, k, v = _wide(qkv, num_heads)
    with _exact(qkv):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = scores.softmax(-1) @ v
    return _joined(out).to(qkv.dtype)


def _check(qkv: Tensor, num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"attention: num_heads: given {num_heads}, allowed 1 or more")
    if qkv.dim() != 3 or not qkv.numel() or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv: given shape {tuple(qkv.shape)}, allowed (N, T, 3 D) with N and T of 1 or more and D a "
            f"multiple of the {num_heads} heads"
        )
    check_dtype("attention", "qkv", qkv, torch.float32, *_HALVES)


def _in_autocast(qkv: Tensor) -> bool:
    return not qkv.is_meta and torch.is_autocast_enabled(qkv.device.type)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k and v as views, (N, T, H, K). Their gradients are stacked where dqkv has them, which is one copy."""
    n, t, row = qkv.shape
    return qkv.view(n, t, 3, num_heads, row // (3 * num_heads)).unbind(2)


def _joined(out: Tensor) -> Tensor:
    """(N, H, T, K) to (N, T, D): a view where the memory is ordered (N, T, H, K), as kernels leave it."""
    n, h, t, k = out.shape
    return out.transpose(1, 2).reshape(n, t, h * k)


def _sdpa(qkv: Tensor, num_heads: int) -> Outputs:
    q, k, v = _heads(qkv, num_heads)
    return (_joined(F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))),)


def _cudnn(qkv: Tensor, num_heads: int) -> Outputs:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(qkv, num_heads)


def _flash(qkv: Tensor, num_heads: int) -> Outputs:
    if qkv.device.type == "cpu":  # torch takes it without being told, and the telling costs more than a small call
        # Its kernel gives 0 where all scores of a row are NaN, and a diverged run would look like a sound one.
        return _sdpa(qkv, num_heads) if _is_finite(qkv) else (attention_reference(qkv, num_heads),)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(qkv, num_heads)


def _is_finite(qkv: Tensor) -> bool:
    """Whether all numbers are finite, by their sum; a sum that overflows counts as not. A trace has no numbers."""
    return torch.compiler.is_compiling() or dispatched((qkv,)) or math.isfinite(float(qkv.detach().sum()))


def _efficient(qkv: Tensor, num_heads: int) -> Outputs:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return _sdpa(qkv, num_heads)


def _flash_attn(module: str, packed: bool = True) -> Callable[[Tensor, int], Outputs]:
    """A version of flash-attention, which takes (N, T, 3, H, K), or q, k and v of (N, T, H, K)."""

    def call(qkv: Tensor, num_heads: int) -> Outputs:
        n, t, row = qkv.shape
        heads = qkv.view(n, t, 3, num_heads, row // (3 * num_heads))
        functions, deterministic = importlib.import_module(module), _deterministic()
        if packed:
            found = functions.flash_attn_qkvpacked_func(heads, deterministic=deterministic)
        else:
            found = functions.flash_attn_func(*heads.unbind(2), deterministic=deterministic)
        return ((found[0] if isinstance(found, tuple) else found).flatten(2),)  # some versions give lse too

    return call


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _absence(majors: tuple[int, ...] = (), module: str = "", remedy: str = "") -> Callable[[], tuple[str, str] | None]:
    """Why a library cannot run on this machine's GPU: it is none of these compute capabilities, a module is missing."""

    @functools.cache
    def absence() -> tuple[str, str] | None:
        if not torch.cuda.is_available():
            return "no CUDA device is visible to PyTorch", "run it on a machine with an NVIDIA GPU"
        major, minor = torch.cuda.get_device_capability()
        if majors and major not in majors:
            allowed = ", ".join(f"{number}.x" for number in majors)
            return f"it is for compute capability {allowed}, and this GPU has {major}.{minor}", "take another backend"
        if module and not _installed(module):
            return f"{module} is not installed", remedy
        return None

    return absence


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


@functools.cache
def _cudnn_is_late() -> bool:
    """Whether PyTorch itself tries cuDNN after the others here."""
    if not torch.cuda.is_available():
        return False
    version = torch.backends.cudnn.version() or 0
    return version <= _CUDNN_READS_BEYOND or torch.cuda.get_device_capability()[0] not in (9, 10)


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    return qkv.shape[2] // (3 * num_heads)


def _against_halves(qkv: Tensor, num_heads: int, widest: int = 256, multiple: int = 8) -> str | None:
    head_dim = _head_dim(qkv, num_heads)
    if qkv.dtype not in _HALVES:
        return f"it takes bfloat16 and float16, and this is {qkv.dtype}"
    if head_dim > widest or head_dim % multiple:
        return f"it takes K up to {widest} that are multiples of {multiple}, and this is {head_dim}"
    return None


def _against_flash(qkv: Tensor, num_heads: int) -> str | None:
    if qkv.device.type == "cpu":
        return None
    if not qkv.is_cuda:
        return f"it takes cpu and cuda tensors, and these are on {qkv.device.type}"
    if torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return "it is for compute capability 8.0 and newer"
    return _against_halves(qkv, num_heads, multiple=1)


def _against_cudnn(qkv: Tensor, num_heads: int) -> str | None:
    tokens = qkv.shape[1]
    if tokens == 1:
        return "it takes T of 2 or more"
    if tokens % 128 and (torch.backends.cudnn.version() or 0) <= _CUDNN_READS_BEYOND:
        return f"cuDNN up to {_CUDNN_READS_BEYOND} takes multiples of 128 tokens, and this is {tokens}"
    if _deterministic():
        return "it is not deterministic"
    return _against_halves(qkv, num_heads, widest=128)


def _against_efficient(qkv: Tensor, num_heads: int) -> str | None:
    head_dim, multiple = _head_dim(qkv, num_heads), 16 // qkv.element_size()
    return f"it takes K that are multiples of {multiple}, and this is {head_dim}" if head_dim % multiple else None


def _against_triton(qkv: Tensor, num_heads: int) -> str | None:
    if qkv.shape[1] > _MOST_TOKENS:
        return f"it takes up to {_MOST_TOKENS} tokens, and these are {qkv.shape[1]}"
    if _head_dim(qkv, num_heads) not in _HEAD_DIMS:
        return f"it takes K of 16 to 128 that are multiples of 8, and this is {_head_dim(qkv, num_heads)}"
    if qkv.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter has no product of bfloat16"
    return None


def _wide(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k and v (N, H, T, K) in float32, or wider if they are."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    n, t, row = qkv.shape
    heads = qkv.to(wide).reshape(n, t, 3, num_heads, row // (3 * num_heads)).unbind(2)
    return tuple(head.transpose(1, 2) for head in heads)


def _exact(qkv: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast does not make matrix products narrower."""
    return torch.autocast(qkv.device.type, enabled=False) if _in_autocast(qkv) else contextlib.nullcontext()


def _body(qkv: Tensor, num_heads: int) -> Outputs:
    q, k, v = _wide(qkv, num_heads)
    with _exact(qkv):
        scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
        lse = scores.logsumexp(-1)
        out = scores.sub_(lse[..., None]).exp_() @ v
    return _joined(out).to(qkv.dtype), lse


def _outputs(qkv: Tensor, num_heads: int) -> Outputs:
    n, t, row = qkv.shape
    return qkv.new_empty((n, t, row // 3)), qkv.new_empty((n, num_heads, t), dtype=torch.float32)


def _backward_body(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Outputs:
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
    return (dqkv.view(qkv.shape),)


def _backward_outputs(dout: Tensor, qkv: Tensor, *flat: Any) -> Outputs:
    return (torch.empty_like(qkv),)


def _launch(kernel: Callable[..., None], inputs: tuple[Any, ...], outputs: Outputs) -> None:
    kernel(*inputs, *outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    qkv, ctx.num_heads, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, dout: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None
    (dqkv,) = _op.differentiate(dout.contiguous(), *ctx.saved_tensors, ctx.num_heads, backend=ctx.backend)
    return dqkv, None


_HOPPER = "pip install . in hopper/ of github.com/Dao-AILab/flash-attention"

_op = declare(
    "attention",
    Pass(
        "(Tensor qkv, int num_heads) -> (Tensor, Tensor)",
        _body,
        _outputs,
        _launch,
        supports={
            "cudnn": _against_cudnn,
            "flash": _against_flash,
            "flash-attn-2": _against_halves,
            "flash-attn-3": _against_halves,
            "flash-attn-4": _against_halves,
            "efficient": _against_efficient,
            "triton": _against_triton,
        },
    ),
    backward=Pass(
        "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads) -> Tensor[]",
        _backward_body,
        _backward_outputs,
        _launch,
        supports={"triton": lambda dout, qkv, *rest: _against_triton(qkv, rest[-1])},
    ),
    gradient=Gradient(_setup_context, _backward),
    backends=BACKENDS,
    libraries={
        "cudnn": Library(_cudnn, _absence((8, 9, 10, 12)), late=_cudnn_is_late),
        "flash": Library(_flash, lambda: None, device=""),
        "flash-attn-2": Library(
            _flash_attn("flash_attn"),
            _absence((8, 9, 10, 12), "flash_attn_2_cuda", "pip install flash-attn --no-build-isolation"),
        ),
        "flash-attn-3": Library(_flash_attn("flash_attn_interface"), _absence((9,), "flash_attn_interface", _HOPPER)),
        "flash-attn-4": Library(
            _flash_attn("flash_attn.cute", packed=False),
            _absence((9, 10), "flash_attn.cute", "pip install flash-attn-4"),
        ),
        "efficient": Library(_efficient, _absence()),
    },
    timed=True,
)


@register_flop_formula(torch.ops.erd_fast.attention_fwd)
def _flops(qkv_shape: Any, num_heads: int, *unused: Any, **how: Any) -> int:
    n, t, row = qkv_shape
    return 4 * n * t * t * (row // 3)


@register_flop_formula(torch.ops.erd_fast.attention_bwd)
def _backward_flops(dout_shape: Any, *unused: Any, **how: Any) -> int:
    n, t, width = dout_shape
    return 10 * n * t * t * width
