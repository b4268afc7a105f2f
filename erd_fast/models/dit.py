"""DiT: the diffusion transformer with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

State-dict keys are those of the published code, so its checkpoints load. Shapes: x (N, C, H, W), tokens (N, T, D),
conditioning c (N, D).
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from erd_fast.models.base import DiffusionModel, check_multiple, check_sizes
from erd_fast.nn.blocks import Attention, Mlp, PatchEmbed, sincos_positions, timestep_embedding
from erd_fast.nn.init import init_normal, init_xavier_uniform
from erd_fast.nn.joined import join, joined_linear
from erd_fast.nn.stream import Norm, Stream

_NORM_EPS = 1e-6
_FREQUENCIES = 256


class DiT(DiffusionModel):
    """Predicts the diffusion target of x_t from the time and, for a conditional model, a class label.

    Args:
        input_size: height and width of x, a multiple of ``patch_size``.
        patch_size: p; T = (input_size / p)^2 tokens.
        in_channels: C.
        hidden_size: D, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over D.
        num_classes: labels are 0 ... num_classes - 1; 0 builds an unconditional model.
        null_label: add a learned label ``num_classes`` for images without one (label dropout and guidance).
        learn_sigma: give 2C output channels, as the checkpoints published with DiT do.
        seed: key of the initial parameters.

    Raises:
        ConfigError: a size is not allowed.
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_label: bool = True,
        learn_sigma: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        check_sizes(
            "DiT",
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
        )
        check_multiple("DiT", "input_size", input_size, ("patch_size", patch_size))
        check_multiple("DiT", "hidden_size", hidden_size, ("", 4), ("num_heads", num_heads))
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.token_patch, self.hidden_size = patch_size, hidden_size
        self.num_classes, self.null_label = num_classes, null_label
        self.out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + null_label, hidden_size) if num_classes else None
        self.register_buffer("pos_embed", sincos_positions(input_size // patch_size, hidden_size)[None])
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize(seed)
        join(self._conditioned())

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) float, t (N,) as trained (index, or t in (0, 1)), y (N,) int64 labels -> (N, C or 2C, H, W).

        Patch tokens (N, T, p p C) as x give those of the prediction.
        """
        self.check_inputs(x, y)
        if self.fused(self.final_layer.linear.weight):
            patches = self._fused(self.as_tokens(x), t, y)
        else:
            patches = self._plain(self.as_images(x), t, y)
        return patches if x.dim() == 3 else self.as_images(patches)

    def _plain(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self._condition(t, y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.final_layer(tokens, c)

    def _fused(self, patches: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """A branch's end and the normalisation after it are one pass, also from the last branch of a block to the next
        block; all conditioning is one product."""
        dtype = self.compute_dtype(self.final_layer.linear.weight)
        tokens = (self.x_embedder.fused(patches.to(dtype)) + self.pos_embed).to(self.residual)
        modulation = joined_linear(F.silu(self._condition(t, y)).to(dtype), self._conditioned())
        shift, scale, *parts = modulation.split(self.hidden_size, dim=-1)
        recompute = tokens.is_cuda if self.recompute is None else self.recompute
        stream = Stream(tokens, Norm(_NORM_EPS, shift, scale), dtype, recompute)
        for block in cast("Iterable[DiTBlock]", self.blocks):
            gate_attn, shift_mlp, scale_mlp, gate_mlp, shift, scale, *parts = parts
            stream.branch(block.attn.fused, gate_attn, Norm(_NORM_EPS, shift_mlp, scale_mlp))
            mlp = functools.partial(block.mlp.fused, recompute=recompute)
            stream.branch(mlp, gate_mlp, Norm(_NORM_EPS, shift, scale))
        return self.final_layer.linear(stream.y)

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        c = self.t_embedder(t)
        return c if self.y_embedder is None else c + self.y_embedder(y)

    def _conditioned(self) -> list[nn.Linear]:
        """The layers that make shifts, scales and gates of the conditioning, the last layer's at the end."""
        return [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]

    def _apply(self, *args: Any, **kwargs: Any) -> "DiT":
        super()._apply(*args, **kwargs)  # of .to() and the like, which give each parameter memory of its own
        join(self._conditioned())
        return self

    def _initialize(self, seed: int) -> None:
        """Xavier for matrices, 0.02 for the embedders, zero for biases and for what ends a branch (adaLN-Zero)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith("final_layer") or ".adaLN_modulation." in name:
                if not parameter.is_meta:
                    nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                init_normal(self, name, seed, std=0.02)
            else:
                init_xavier_uniform(self, name, seed)


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm that the conditioning shifts and scales, on a branch that it gates."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=_NORM_EPS, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=_NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then the values of each token's patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=_NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    """Time (N,) to (N, D): 256 sinusoids and a two-layer MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, _FREQUENCIES).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Label (N,) to (N, D); the last row is the null label, where there is one."""

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.embedding_table.weight)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) x + shift."""
    return x * (1 + scale) + shift


_WIDTHS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "depth": 6, "num_heads": 3},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
SIZES: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": {**widths, "patch_size": patch} for size, widths in _WIDTHS.items() for patch in (1, 2, 4, 8)
}
"""Published sizes, and ``tiny`` for data sets of small images."""
