"""Modules shared by the transformer models, with the parameter names of timm and the published DiT code.

``forward`` is plain PyTorch, what the kernels are held against; ``fused`` computes the same by the ops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erd_fast.ops import attention, gelu_mlp


class PatchEmbed(nn.Module):
    """Image (N, C, H, W) to patch tokens (N, T, D), T = H W / p^2, by a p x p convolution of stride p."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)

    def fused(self, tokens: Tensor) -> Tensor:
        """The same of patches (N, T, p p C) in the layout of :mod:`erd_fast.ops.patchify`: a matrix product."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(tokens, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D), one projection for q, k and v."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))

    def fused(self, x: Tensor) -> Tensor:
        """The same by the op."""
        return self.proj(attention(self.qkv(x), self.num_heads))


class Mlp(nn.Module):
    """Linear, GELU, linear over tokens (N, T, D). ``approximate`` is "tanh" for DiT, "none" (erf) for U-ViT."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4.0, approximate: str = "tanh"):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))

    def fused(self, x: Tensor, recompute: bool) -> Tensor:
        """The same by the op; with ``recompute`` the activation is made again in the backward pass."""
        first, second = self.fc1, self.fc2
        layers = (first.weight, first.bias, second.weight, second.bias)
        return gelu_mlp(x, *layers, approximate=self.approximate, recompute=recompute)


def timestep_embedding(t: Tensor, size: int, max_period: float = 10_000.0) -> Tensor:
    """cos(t f) beside sin(t f) for size / 2 frequencies f from 1 to 1 / max_period: (N,) -> (N, size) float32."""
    half = size // 2
    powers = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * powers)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def sincos_positions(side: int, size: int) -> Tensor:
    """Fixed 2-D positions of a side x side grid of tokens, (side^2, size) float32: column halves first, then row.

    Each half is sin(p f) beside cos(p f) for size / 4 frequencies f = 10000^(-i / (size / 4)).
    """
    frequencies = 10_000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns = line[None].expand(side, -1, -1)
    return torch.cat((columns, columns.transpose(0, 1)), dim=-1).flatten(0, 1).float()
