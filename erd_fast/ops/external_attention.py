"""Attention functions of PyTorch and flash-attention as backends of :mod:`erd_fast.ops.attention`."""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from erd_fast.ops.availability import NO_GPU, Reason
from erd_fast.ops.core.backend import Backend, External
from erd_fast.ops.core.op import dispatched

HALVES = (torch.bfloat16, torch.float16)
_CUDNN_READS_BEYOND = 91500  # up to this version it reads past the last token where T is no multiple of 128


def sdpa(qkv: Tensor, num_heads: int) -> Tensor:
    """PyTorch's function, (N, T, 3 D) to (N, T, D). q, k and v are views; their gradients are stacked where dqkv has
    them, which is one copy."""
    heads = _heads(qkv, num_heads)
    if heads.requires_grad:
        q, k, v = heads.unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:  # the same views by fewer calls
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def merge_heads(out: Tensor) -> Tensor:
    """(N, H, T, K) to (N, T, D): a view where the memory is ordered (N, T, H, K), as kernels leave it."""
    n, h, t, k = out.shape
    return out.transpose(1, 2).reshape(n, t, h * k)


def _sdpa_with(backend: SDPBackend) -> Callable[[Tensor, int], Tensor]:
    def call(qkv: Tensor, num_heads: int) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(qkv, num_heads)

    return call


_flash_on_gpu = _sdpa_with(SDPBackend.FLASH_ATTENTION)


def _flash(qkv: Tensor, num_heads: int) -> Tensor:
    if not qkv.is_cpu:
        return _flash_on_gpu(qkv, num_heads)
    if _scores_are_finite(qkv):  # torch selects it on a CPU by itself, and a request takes longer than a small call
        return sdpa(qkv, num_heads)
    # PyTorch's functions return 0 where all scores of a row are NaN or -inf, which would hide that a run diverged.
    from erd_fast.ops.attention import attention_reference  # which imports this module

    return attention_reference(qkv, num_heads)


def _scores_are_finite(qkv: Tensor) -> bool:
    """Whether q k^T is finite for certain: by Cauchy and Schwarz it is at most the square of the norm of all numbers,
    which PyTorch accumulates in float32. A trace has no numbers."""
    if torch.compiler.is_compiling() or dispatched(qkv):
        return True
    return math.isfinite(torch.linalg.vector_norm(qkv.detach()).item())


def _flash_attn_2(qkv: Tensor, num_heads: int) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    out: Tensor = flash_attn_qkvpacked_func(_heads(qkv, num_heads), deterministic=_deterministic())
    return out.flatten(2)


def _flash_attn_3(qkv: Tensor, num_heads: int) -> Tensor:
    from flash_attn_interface import flash_attn_qkvpacked_func

    found = flash_attn_qkvpacked_func(_heads(qkv, num_heads), deterministic=_deterministic())
    out: Tensor = found[0] if isinstance(found, tuple) else found  # some versions return lse too
    return out.flatten(2)


def _flash_attn_4(qkv: Tensor, num_heads: int) -> Tensor:
    from flash_attn.cute import flash_attn_func

    heads = _heads(qkv, num_heads)
    found = flash_attn_func(*heads.unbind(2), deterministic=_deterministic())
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.flatten(2)


def _heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(N, T, 3, H, K), a view."""
    n, t, row = qkv.shape
    return qkv.view(n, t, 3, num_heads, row // (3 * num_heads))


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _unavailable(majors: tuple[int, ...] = (), module: str = "", remedy: str = "") -> Callable[[], Reason | None]:
    """Why a function cannot run on this machine's GPU, of which compute capabilities it needs one, and a module."""

    @functools.cache
    def unavailable() -> Reason | None:
        if not torch.cuda.is_available():
            return NO_GPU
        major, minor = torch.cuda.get_device_capability()
        if majors and major not in majors:
            allowed = ", ".join(f"{number}.x" for number in majors)
            return Reason(
                f"it is for compute capability {allowed}, and this GPU has {major}.{minor}", "take another backend"
            )
        return Reason(f"{module} is not installed", remedy) if module and not _installed(module) else None

    return unavailable


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


@functools.cache
def _cudnn_priority() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(cudnn_is_late(_cudnn_version(), torch.cuda.get_device_capability()[0]))


def cudnn_is_late(version: int, major: int) -> bool:
    """Whether PyTorch itself tries this version of cuDNN after the others, on GPUs of this compute capability."""
    return version <= _CUDNN_READS_BEYOND or major not in (9, 10)


def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    return qkv.shape[2] // (3 * num_heads)


def _halves_rule(qkv: Tensor, num_heads: int, widest: int = 256, multiple: int = 8) -> str | None:
    head_dim = _head_dim(qkv, num_heads)
    if qkv.dtype not in HALVES:
        return f"it takes bfloat16 and float16, and this is {qkv.dtype}"
    if head_dim > widest or head_dim % multiple:
        return f"it takes K up to {widest} that are multiples of {multiple}, and this is {head_dim}"
    return None


def _flash_rule(qkv: Tensor, num_heads: int) -> str | None:
    if qkv.is_cpu:
        return None
    if not qkv.is_cuda:
        return f"it takes cpu and cuda tensors, and these are on {qkv.device.type}"
    if torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return "it is for compute capability 8.0 and newer"
    return _halves_rule(qkv, num_heads, multiple=1)


def _cudnn_rule(qkv: Tensor, num_heads: int) -> str | None:
    return cudnn_rule(qkv, num_heads, _cudnn_version())


def cudnn_rule(qkv: Tensor, num_heads: int, version: int) -> str | None:
    """Why this version of cuDNN cannot run a call."""
    tokens = qkv.shape[1]
    if tokens == 1:
        return "it takes T of 2 or more"
    if tokens % 128 and version <= _CUDNN_READS_BEYOND:
        return f"cuDNN up to {_CUDNN_READS_BEYOND} takes multiples of 128 tokens, and this is {tokens}"
    if _deterministic():
        return "it is not deterministic"
    return _halves_rule(qkv, num_heads, widest=128)


def _efficient_rule(qkv: Tensor, num_heads: int) -> str | None:
    head_dim, multiple = _head_dim(qkv, num_heads), 16 // qkv.element_size()
    return f"it takes K that are multiples of {multiple}, and this is {head_dim}" if head_dim % multiple else None


EXTERNAL: tuple[Backend, ...] = (
    External(
        "cudnn",
        _sdpa_with(SDPBackend.CUDNN_ATTENTION),
        _cudnn_rule,
        _unavailable((8, 9, 10, 12)),
        priority=_cudnn_priority,
    ),
    External("flash", _flash, _flash_rule, device=""),
    External(
        "flash-attn-3",
        _flash_attn_3,
        _halves_rule,
        _unavailable((9,), "flash_attn_interface", "pip install . in hopper/ of github.com/Dao-AILab/flash-attention"),
    ),
    External(
        "flash-attn-2",
        _flash_attn_2,
        _halves_rule,
        _unavailable((8, 9, 10, 12), "flash_attn_2_cuda", "pip install flash-attn --no-build-isolation"),
    ),
    External(
        "flash-attn-4",
        _flash_attn_4,
        _halves_rule,
        _unavailable((9, 10), "flash_attn.cute", "pip install flash-attn-4"),
    ),
    External("efficient", _sdpa_with(SDPBackend.EFFICIENT_ATTENTION), _efficient_rule, _unavailable()),
)
"""In the order of ``auto``; :func:`erd_fast.ops.attention` says why."""
