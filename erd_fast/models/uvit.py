"""U-ViT: a transformer that takes time and label as tokens, its blocks joined by long skips (Bao et al., arXiv
2209.12152).

State-dict keys are those of the published code, so its checkpoints load. Shapes: x (N, C, H, W), tokens (N, L, D) in
the order label, time, T patches: L = T + 2, or T + 1 without labels.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erd_fast.errors import ConfigError
from erd_fast.models.base import DiffusionModel, check_multiple, check_sizes
from erd_fast.nn.blocks import Attention, Mlp, PatchEmbed, timestep_embedding
from erd_fast.nn.init import init_normal, init_uniform
from erd_fast.nn.stream import Norm, Stream

_NORM_EPS = 1e-5


class UViT(DiffusionModel):
    """Predicts the diffusion target of x_t from the time and, for a conditional model, a class label.

    Args:
        input_size: height and width of x, a multiple of ``patch_size``.
        patch_size: p; T = (input_size / p)^2 patches.
        in_channels: C.
        hidden_size: D, even and a multiple of ``num_heads``.
        depth: blocks that a long skip begins or ends at, half of them each; even. One more lies in the middle, so the
            papers' "layers" are depth + 1: 12 for U-ViT-S, which has 13.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over D.
        num_classes: labels are 0 ... num_classes - 1; 0 builds an unconditional model, without label token.
        null_label: add a learned label ``num_classes`` for images without one (label dropout and guidance).
        mlp_time_embed: send the sinusoids of the time through a two-layer MLP. No published configuration does.
        conv: end with a 3 x 3 convolution of the image.
        pos_std: standard deviation of the initial positions. The published 0.02 is small beside patches and time, and a
            short run spends its first hundreds of steps on telling places apart.
        seed: key of the initial parameters.

    Raises:
        ConfigError: a size is not allowed.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1024,
        depth: int = 20,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_label: bool = True,
        mlp_time_embed: bool = False,
        conv: bool = True,
        pos_std: float = 0.02,
        seed: int = 0,
    ):
        super().__init__()
        check_sizes(
            "UViT",
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
        )
        check_multiple("UViT", "input_size", input_size, ("patch_size", patch_size))
        check_multiple("UViT", "hidden_size", hidden_size, ("", 2), ("num_heads", num_heads))
        if depth % 2:
            raise ConfigError(
                f"UViT: depth: given {depth}, allowed even numbers (the papers' layers less the middle one)"
            )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.token_patch, self.num_classes, self.null_label = patch_size, num_classes, null_label
        self.hidden_size, self.extra_tokens = hidden_size, 2 if num_classes else 1

        self.patch_embed = PatchEmbed(patch_size, in_channels, hidden_size)
        self.time_embed = _time_mlp(hidden_size) if mlp_time_embed else nn.Identity()
        self.label_emb = nn.Embedding(num_classes + null_label, hidden_size) if num_classes else None
        tokens = self.extra_tokens + (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        self.in_blocks = nn.ModuleList(UViTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth // 2))
        self.mid_block = UViTBlock(hidden_size, num_heads, mlp_ratio)
        self.out_blocks = nn.ModuleList(
            UViTBlock(hidden_size, num_heads, mlp_ratio, skip=True) for _ in range(depth // 2)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.decoder_pred = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1) if conv else nn.Identity()
        self._initialize(seed, pos_std)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) float, t (N,) as trained (index, or t in (0, 1)), y (N,) int64 labels -> (N, C, H, W).

        Patch tokens (N, T, p p C) as x give those of the prediction.
        """
        self.check_inputs(x, y)
        if self.fused(self.decoder_pred.weight):
            dtype = self.compute_dtype(self.decoder_pred.weight)
            tokens = self._fused(self._embed(self.patch_embed.fused(self.as_tokens(x).to(dtype)), t, y), dtype)
        else:
            tokens = self._plain(self._embed(self.patch_embed(self.as_images(x)), t, y))
        patches = self.decoder_pred(tokens)[:, self.extra_tokens :]
        if isinstance(self.final_layer, nn.Identity):
            return patches if x.dim() == 3 else self.as_images(patches)
        images = self.final_layer(self.as_images(patches))
        return self.as_tokens(images) if x.dim() == 3 else images

    def _plain(self, tokens: Tensor) -> Tensor:
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        return self.norm(tokens)

    def _fused(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """A branch's end and the normalisation after it are one pass, except before a skip's linear layer."""
        descent = cast("list[UViTBlock]", [*self.in_blocks, self.mid_block])
        ascent = cast("list[UViTBlock]", [self.mid_block, *self.out_blocks])
        recompute = tokens.is_cuda if self.recompute is None else self.recompute
        stream = Stream(tokens.to(self.residual), Norm.of(descent[0].norm1), dtype, recompute)
        skips = []
        for block, following in itertools.pairwise(descent):
            stream.branch(block.attn.fused, None, Norm.of(block.norm2))
            stream.branch(block.fused_mlp(recompute), None, Norm.of(following.norm1))
            skips.append(stream.x)
        for block, following in itertools.pairwise(ascent):
            stream.branch(block.attn.fused, None, Norm.of(block.norm2))
            tokens = stream.last_branch(block.fused_mlp(recompute))
            tokens = following.fused_skip(tokens.to(dtype), skips.pop().to(dtype))
            stream.restart(tokens.to(self.residual), Norm.of(following.norm1))
        last = ascent[-1]
        stream.branch(last.attn.fused, None, Norm.of(last.norm2))
        stream.branch(last.fused_mlp(recompute), None, Norm.of(self.norm))
        return stream.y

    def _embed(self, patches: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        read_by = next(self.time_embed.parameters(), self.pos_embed)
        time = self.time_embed(timestep_embedding(t, self.hidden_size).to(read_by.dtype))
        tokens = [time[:, None], patches]
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(y)[:, None])
        return torch.cat(tokens, dim=1) + self.pos_embed

    def _initialize(self, seed: int, pos_std: float) -> None:
        """Normals of 0.02 for linear layers and positions, whose biases are zero. What the published code leaves to
        PyTorch begins as there: labels as standard normals, convolutions uniform up to 1 / sqrt(fan_in).

        The published code truncates its normals at the values -2 and 2, which are 100 deviations: nowhere.
        """
        init_normal(self, "pos_embed", seed, std=pos_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                init_normal(self, f"{name}.weight", seed, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                init_uniform(self, f"{name}.weight", seed, bound)
                init_uniform(self, f"{name}.bias", seed, bound)
            elif isinstance(module, nn.Embedding):
                init_normal(self, f"{name}.weight", seed, std=1.0)


class UViTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm on a branch; where a long skip ends, a linear layer before them
    takes x and skip, side by side."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, skip: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.mlp = Mlp(hidden_size, mlp_ratio, approximate="none")
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def fused_mlp(self, recompute: bool) -> Callable[[Tensor], Tensor]:
        return functools.partial(self.mlp.fused, recompute=recompute)

    def fused_skip(self, x: Tensor, skip: Tensor) -> Tensor:
        """The linear layer of x and skip as two products of which the second adds to the first: nothing is copied side
        by side."""
        assert self.skip_linear is not None
        of_x, of_skip = self.skip_linear.weight.split(x.shape[-1], dim=1)
        first = F.linear(x, of_x, self.skip_linear.bias)
        return torch.addmm(first.flatten(0, 1), skip.flatten(0, 1), of_skip.t()).view_as(first)


def _time_mlp(hidden_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size))


_WIDTHS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "depth": 4, "num_heads": 3, "pos_std": 0.5},
    "S": {"hidden_size": 512, "depth": 12, "num_heads": 8},
    "S-D": {"hidden_size": 512, "depth": 16, "num_heads": 8},
    "M": {"hidden_size": 768, "depth": 16, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 20, "num_heads": 16},
    # The checkpoints published with U-ViT have no convolution here; ERD's code builds it, with 148 parameters more.
    "H": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "conv": False},
}
SIZES: dict[str, dict[str, Any]] = {
    f"U-ViT-{size}/{patch}": {**widths, "patch_size": patch} for size, widths in _WIDTHS.items() for patch in (2, 4)
} | {"U-ViT-tiny": {**_WIDTHS["tiny"], "patch_size": 2}}
"""Published sizes, and ``tiny`` for data sets of small images, whose plain name has patch 2. The model published for
CelebA-64 is ``U-ViT-S/4`` with ``input_size=64, in_channels=3, num_classes=0``."""
