"""Inputs of the normalising ops, as models have them."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens(seed: int, shape: tuple[int, ...], dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Rows that differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (0.5 + torch.rand(*shape[:2], 1, generator=generator))
    x += torch.randn(*shape[:2], 1, generator=generator)
    return x.to(DEVICE, dtype).requires_grad_(grad)


def modulation(seed: int, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Chunks of one wide projection, as a model has them: rows are far apart in memory."""
    samples, _, width = shape
    generator = torch.Generator().manual_seed(seed + 100)
    wide = torch.randn(samples, (count + 1) * width, generator=generator).to(DEVICE, dtype)
    return [chunk.requires_grad_() for chunk in wide[:, width:].chunk(count, dim=1)]
