"""PyTorch's process-wide numeric switches (TensorFloat-32, reductions of products, deterministic cuDNN), and how it
reports that memory is full."""

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TensorFloat-32 in float32 matrix products and convolutions of the whole process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def allow_reduced_precision_reductions(allowed: bool) -> None:
    """Allow or forbid cuBLAS to round partial sums of bfloat16 and float16 products. PyTorch allows it by default."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = allowed


@contextlib.contextmanager
def float32_products(*, tf32: bool, deterministic: bool = False) -> Iterator[None]:
    """Compute float32 products with or without TensorFloat-32 inside the block, then restore what was set before.

    Args:
        tf32: whether TensorFloat-32 is allowed.
        deterministic: restrict cuDNN to deterministic algorithms.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic
    try:
        allow_tf32(tf32)
        cudnn.deterministic = deterministic or cudnn.deterministic
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.deterministic = before[1:]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full: libraries and graphs allocate too, and have no exception of their own for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))
