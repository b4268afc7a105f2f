"""Precision of matrix products, PyTorch's process-wide numeric switches, and how it reports that memory is full."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import torch

from erd_fast.errors import RunError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISION_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Dtype of the operands of matrix products at each precision; ``tf32`` and ``fp32`` differ in :func:`allow_tf32`."""


def set_numerics(precision: Precision, device: torch.device, *, deterministic: bool = False) -> None:
    """Set the switches of the whole process for training at ``precision`` on ``device``.

    On a GPU only ``fp32`` forbids TensorFloat-32, and products are reduced in float32. ``deterministic`` restricts
    PyTorch to deterministic algorithms.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic in no other way
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        allow_tf32(precision != "fp32")
        # A weight's gradient is a sum over all tokens of a batch; cuBLAS may split it, and round the parts to bfloat16.
        allow_reduced_precision_reductions(False)


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
    """Whether an error means that a GPU's memory is full.

    Libraries and CUDA graphs allocate too, and report it by a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "ALLOC_FAILED"))


@contextlib.contextmanager
def explained_out_of_memory(advice: str) -> Iterator[None]:
    """Raise RunError with ``advice`` and PyTorch's own first line where memory is full within the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"{advice} ({str(error).splitlines()[0]})") from error
