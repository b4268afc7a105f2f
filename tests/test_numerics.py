"""numerics: process-wide switches inside a block, and restored after it."""

import pytest
import torch

from erd_fast.numerics import allow_tf32, float32_products


def _switches() -> tuple[str, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic


@pytest.fixture(autouse=True)
def restored():
    before = _switches()
    yield
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
