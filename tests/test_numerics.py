"""numerics: process-wide switches, inside a block and of a whole run, and errors that mean full memory."""

import os

import pytest
import torch

from erd_fast.errors import RunError
from erd_fast.numerics import (
    allow_reduced_precision_reductions,
    allow_tf32,
    explained_out_of_memory,
    float32_products,
    is_out_of_memory,
    set_numerics,
)

GPU = torch.device("cuda")
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
OTHERS = [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")]


def _switches() -> tuple[str, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic


@pytest.fixture(autouse=True)
def restored():
    before, deterministic = _switches(), torch.are_deterministic_algorithms_enabled()
    yield
    allow_reduced_precision_reductions(True)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before[1:]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_in_products_and_convolutions_alike(allowed):
    allow_tf32(allowed)
    assert _switches()[:2] == ("high" if allowed else "highest", allowed)


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_block_has_its_own_switches_and_restores_those_it_found(tf32, deterministic):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not tf32
    before = _switches()
    with float32_products(tf32=tf32, deterministic=deterministic):
        assert _switches() == ("high" if tf32 else "highest", tf32, deterministic)
    assert _switches() == before
    with pytest.raises(ZeroDivisionError), float32_products(tf32=tf32, deterministic=deterministic):
        raise ZeroDivisionError
    assert _switches() == before


def test_determinism_that_is_set_already_stays():
    torch.backends.cudnn.deterministic = True
    with float32_products(tf32=True):
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
def test_on_a_gpu_the_precision_decides_on_tf32(precision, tf32):
    allow_tf32(not tf32)
    set_numerics(precision, GPU)
    assert _switches()[:2] == ("high" if tf32 else "highest", tf32)


def test_on_a_gpu_products_are_reduced_in_float32():
    """A weight's gradient sums over all tokens; by default cuBLAS may round parts of the sum to bfloat16."""
    matmul = torch.backends.cuda.matmul
    allow_reduced_precision_reductions(True)
    set_numerics("bf16", GPU)
    assert not matmul.allow_bf16_reduced_precision_reduction and not matmul.allow_fp16_reduced_precision_reduction


def test_on_a_cpu_switches_of_the_gpu_stay():
    before = _switches()
    set_numerics("bf16" if before[0] == "highest" else "fp32", torch.device("cpu"))
    assert _switches() == before and torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_a_deterministic_run_has_deterministic_algorithms(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_numerics("fp32", torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_numerics("fp32", torch.device("cpu"), deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("error", FULL, ids=str)
def test_full_memory_is_recognised_and_explained_in_one_line(error):
    assert is_out_of_memory(error)
    first = str(error).splitlines()[0]
    with pytest.raises(RunError) as raised, explained_out_of_memory("take a smaller batch"):
        raise error
    assert str(raised.value) == f"take a smaller batch ({first})" and raised.value.__cause__ is error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_full_memory(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, explained_out_of_memory("take a smaller batch"):
        raise error
    assert raised.value is error
