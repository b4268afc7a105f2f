"""Initial parameters as a pure function of (seed, name of the parameter, element): docs/design.md, "Randomness".

The same model is born on any device, with any number of ranks, and in any order of construction.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from erd_fast.random import Purpose, Stream, box_muller, unit_interval, words

_BLOCKS_AT_ONCE = 1 << 16  # bounds the memory of the int64 words


def init_normal(module: nn.Module, name: str, seed: int, std: float) -> None:
    """Fill the parameter called ``name`` of ``module`` with normals of standard deviation ``std``."""
    _fill(module.get_parameter(name), name, seed, lambda word: box_muller(word) * std)


def init_uniform(module: nn.Module, name: str, seed: int, bound: float) -> None:
    """Fill with uniforms between -``bound`` and ``bound``; 1 / sqrt(fan_in) is PyTorch's for linear layers and
    convolutions."""
    _fill(module.get_parameter(name), name, seed, lambda word: (2.0 * unit_interval(word) - 1.0) * bound)


def init_xavier_uniform(module: nn.Module, name: str, seed: int) -> None:
    """Fill with uniforms of variance 2 / (fan_in + fan_out) (Glorot & Bengio 2010); a convolution counts as its
    matrix."""
    parameter = module.get_parameter(name)
    fan_out, fan_in = parameter.flatten(1).shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    init_uniform(module, name, seed, bound)


@torch.no_grad()
def _fill(parameter: nn.Parameter, name: str, seed: int, make: Callable[[Tensor], Tensor]) -> None:
    if parameter.is_meta:
        return
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    g = torch.tensor([int.from_bytes(digest, "little") >> 1], device=parameter.device)
    values = parameter.view(-1)
    for start in range(0, values.numel(), 4 * _BLOCKS_AT_ONCE):
        part = values[start : start + 4 * _BLOCKS_AT_ONCE]
        blocks = torch.arange(start // 4, start // 4 + -(-part.numel() // 4), device=parameter.device)
        word = words(seed, Purpose.INIT, Stream.SCALARS, g, blocks)
        part.copy_(make(word).view(-1)[: part.numel()])
