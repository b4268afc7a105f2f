"""ADM's U-Net (Dhariwal & Nichol, arXiv 2105.05233): residual blocks and attention on levels of halving resolution.

As published: time and label shift and scale the second norm of each residual block, and residual blocks change the
resolution. State-dict keys are those of openai/guided-diffusion, so its checkpoints load. Shapes: x (N, C, H, W),
conditioning c (N, 4 ``model_channels``).

There is no dropout (published for ImageNet-64 and LSUN: 0.1). PyTorch's draws from a global generator, and every random
number of the engine is a function of seed and image.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erd_fast.errors import ConfigError
from erd_fast.models.base import DiffusionModel, check_multiple, check_sizes
from erd_fast.nn.blocks import timestep_embedding
from erd_fast.nn.init import init_normal, init_uniform

_GROUPS = 32
_BRANCH_ENDS = ("out_layers.3", "proj_out", "out.2")

_Block = Callable[[int, int], list[nn.Module]]
"""(level, channels that come in) -> residual block, and attention where the level has it."""


class UNet(DiffusionModel):
    """Predicts the diffusion target of x_t from the time and, for a conditional model, a class label.

    Args:
        input_size: height and width of x, a multiple of 2^(levels - 1).
        in_channels: C.
        model_channels: a multiple of 32; also the number of sinusoids of the time.
        num_res_blocks: residual blocks of a level on the way down; there is one more on the way up.
        channel_mult: width of each level over ``model_channels``; a level has half the resolution of the one before.
        attention_resolutions: heights of the levels that have attention, in pixels. Those that no level has are left
            aside, so that a named model can be built for images of another size. The middle always has attention.
        num_heads: attention heads.
        head_channels: channels of a head, in place of ``num_heads``.
        new_attention_order: channels of qkv are (q k v, head, channel), as in the published ImageNet-64 checkpoint, not
            (head, q k v, channel), as in the others. With one head there is no difference.
        num_classes: labels are 0 ... num_classes - 1; 0 builds an unconditional model.
        null_label: add a learned label ``num_classes`` for images without one (label dropout and guidance).
        learn_sigma: give 2C output channels, as the published checkpoints do.
        seed: key of the initial parameters.

    Raises:
        ConfigError: a size is not allowed.
    """

    def __init__(
        self,
        input_size: int = 64,
        in_channels: int = 3,
        model_channels: int = 128,
        num_res_blocks: int = 3,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        attention_resolutions: Collection[int] = (32, 16, 8),
        num_heads: int = 1,
        head_channels: int | None = None,
        new_attention_order: bool = False,
        num_classes: int = 0,
        null_label: bool = True,
        learn_sigma: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        check_sizes(
            "UNet",
            input_size=input_size,
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            num_classes=num_classes,
        )
        check_multiple("UNet", "model_channels", model_channels, ("", _GROUPS))
        if not channel_mult or min(channel_mult) < 1:
            raise ConfigError(f"UNet: channel_mult: given {tuple(channel_mult)}, allowed one or more numbers from 1")
        check_multiple("UNet", "input_size", input_size, ("2^(levels - 1) =", 2 ** (len(channel_mult) - 1)))
        widths = [multiple * model_channels for multiple in channel_mult]
        attends = [input_size >> level in attention_resolutions for level in range(len(widths))]
        _check_heads(
            {widths[-1], *(widths[level] for level, has in enumerate(attends) if has)}, num_heads, head_channels
        )
        self.input_size, self.in_channels, self.model_channels = input_size, in_channels, model_channels
        self.num_classes, self.null_label = num_classes, null_label
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        cond = 4 * model_channels

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(width, width // head_channels if head_channels else num_heads, new_attention_order)

        def block(level: int, channels: int) -> list[nn.Module]:
            residual = ResBlock(channels, widths[level], cond)
            return [residual, attention(widths[level])] if attends[level] else [residual]

        self.time_embed = nn.Sequential(nn.Linear(model_channels, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.label_emb = nn.Embedding(num_classes + null_label, cond) if num_classes else None
        first, last = widths[0], widths[-1]
        self.input_blocks, skips = _way_down(in_channels, widths, num_res_blocks, cond, block)
        self.middle_block = Stage([ResBlock(last, last, cond), attention(last), ResBlock(last, last, cond)])
        self.output_blocks = _way_up(skips, widths, num_res_blocks, cond, block)
        self.out = nn.Sequential(GroupNorm32(first), nn.SiLU(), nn.Conv2d(first, self.out_channels, 3, padding=1))
        self._initialize(seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) float, t (N,) as trained (index, or t in (0, 1)), y (N,) int64 labels -> (N, C or 2C, H,
        W)."""
        self.check_inputs(x, y)
        dtype = next(self.time_embed.parameters()).dtype
        c = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))
        if self.label_emb is not None:
            c = (c + self.label_emb(y)).to(dtype)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, c)
            skips.append(x)
        x = self.middle_block(x, c)
        for stage in self.output_blocks:
            x = stage(torch.cat((x, skips.pop()), dim=1), c)
        return self.out(x)

    def _initialize(self, seed: int) -> None:
        """PyTorch's defaults in distribution, and zero for what ends a branch."""
        for name, module in self.named_modules():
            if name.endswith(_BRANCH_ENDS):
                for parameter in module.parameters():
                    if not parameter.is_meta:
                        nn.init.zeros_(parameter)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                init_uniform(self, f"{name}.weight", seed, bound)
                init_uniform(self, f"{name}.bias", seed, bound)
            elif isinstance(module, nn.Embedding):
                init_normal(self, f"{name}.weight", seed, std=1.0)


def _way_down(
    in_channels: int, widths: list[int], num_res_blocks: int, cond: int, block: _Block
) -> tuple[nn.ModuleList, list[int]]:
    """Stages from full resolution to the lowest, and the width of what each of them gives."""
    stages, skips = [Stage([nn.Conv2d(in_channels, widths[0], 3, padding=1)])], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            stages.append(Stage(block(level, skips[-1])))
            skips.append(width)
        if level < len(widths) - 1:
            stages.append(Stage([ResBlock(width, width, cond, nn.AvgPool2d(2))]))
            skips.append(width)
    return nn.ModuleList(stages), skips


def _way_up(skips: list[int], widths: list[int], num_res_blocks: int, cond: int, block: _Block) -> nn.ModuleList:
    """Stages from the lowest resolution to the full one; each takes the next of ``skips``, last first, beside x."""
    stages, channels, remaining = [], widths[-1], list(skips)
    for level in reversed(range(len(widths))):
        for i in range(num_res_blocks + 1):
            layers = block(level, channels + remaining.pop())
            channels = widths[level]
            if level and i == num_res_blocks:
                layers.append(ResBlock(channels, channels, cond, nn.Upsample(scale_factor=2)))
            stages.append(Stage(layers))
    return nn.ModuleList(stages)


class Stage(nn.ModuleList):
    """Layers one after the other; residual blocks also take the conditioning."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, c) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """x plus two convolutions, each behind GroupNorm and SiLU; c shifts and scales the second norm.

    ``resample`` changes the resolution: of x, and of the branch before its first convolution.
    """

    def __init__(self, channels: int, out_channels: int, cond: int, resample: nn.Module | None = None):
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cond, 2 * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Identity(),  # the published code's dropout: the convolution must be number 3
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        scale, shift = self.emb_layers(c)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """x plus self-attention between the pixels of GroupNorm(x)."""

    def __init__(self, channels: int, num_heads: int, new_order: bool):
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = _pointwise(self.qkv, self.norm(x).flatten(2).transpose(1, 2))
        heads, size = self.num_heads, c // self.num_heads
        shape, axis = ((3, heads, size), 2) if self.new_order else ((heads, 3, size), 3)
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(2, shape).unbind(axis))
        # Published: q and k, each over the fourth root of the head's size; here their product over the square root.
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        return x + _pointwise(self.proj_out, mixed).transpose(1, 2).reshape(x.shape)


def _pointwise(conv: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of size 1 on tokens (N, T, C): fused attention needs q, k and v with the channels innermost."""
    return F.linear(tokens, conv.weight[:, :, 0], conv.bias)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm of 32 groups in float32. PyTorch's keeps the statistics of a bfloat16 input in bfloat16 for the
    gradient."""

    def __init__(self, channels: int):
        super().__init__(_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)


def _check_heads(widths: set[int], num_heads: int, head_channels: int | None) -> None:
    """``widths``: those of the levels that have attention."""
    name, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    if value < 1 or any(width % value for width in widths):
        allowed = ", ".join(map(str, sorted(widths)))
        raise ConfigError(f"UNet: {name}: given {value}, allowed divisors of the widths with attention, {allowed}")


SIZES: dict[str, dict[str, Any]] = {
    "ADM-tiny": {
        "input_size": 8,
        "in_channels": 1,
        "model_channels": 32,
        "num_res_blocks": 2,
        "channel_mult": (1, 2),
        "attention_resolutions": (4,),
        "num_classes": 10,
    },
    "ADM-CelebA64": {
        "input_size": 64,
        "model_channels": 128,
        "num_res_blocks": 3,
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (32, 16, 8),
        "num_heads": 1,
    },
    "ADM-64": {
        "input_size": 64,
        "model_channels": 192,
        "num_res_blocks": 3,
        "channel_mult": (1, 2, 3, 4),
        "attention_resolutions": (32, 16, 8),
        "head_channels": 64,
        "new_attention_order": True,
        "num_classes": 1000,
        "null_label": False,
    },
}
"""ERD's model of CelebA-64, the published one of ImageNet-64, and ``tiny`` for data sets of small images."""
