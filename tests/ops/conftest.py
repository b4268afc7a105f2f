"""What tests of ops share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erd_fast.ops import OPS


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a kernel does not write is NaN, or a number that stands out."""
    for direction in (one for op in OPS.values() for one in (op.forward, op.backward) if one is not None):
        make = direction.empty

        def filled(make: Any = make, **args: Any) -> tuple[Tensor, ...]:
            outputs = make(**args)
            for output in outputs:
                output.fill_(_poison(output.dtype))
            return outputs

        monkeypatch.setattr(direction, "empty", filled)


def _poison(dtype: torch.dtype) -> float | bool:
    return float("nan") if dtype.is_floating_point else (True if dtype == torch.bool else -9)
