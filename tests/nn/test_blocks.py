"""Modules that the models share; most are tested in the models that they are parts of."""

import copy

import pytest
import torch
from torch import Tensor, nn

from erd_fast.nn.blocks import Attention, Mlp, PatchEmbed
from erd_fast.ops.patchify import patchify
from support.parity import no_worse


def held(layer: nn.Module, found: Tensor, x: Tensor) -> None:
    """No further from the layer in float64 than twice the layer."""
    no_worse([found], [layer(x)], [copy.deepcopy(layer).double()(x.double())])


@pytest.mark.parametrize(("patch", "channels"), [(1, 3), (2, 4), (4, 1)])
def test_patches_are_embedded_by_a_product_as_by_a_convolution(patch, channels):
    images, embed = torch.randn(3, channels, 8, 8), PatchEmbed(patch, channels, 24)
    held(embed, embed.fused(patchify(images, patch)), images)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_by_the_op_is_that_of_plain_pytorch(bias):
    x, layer = torch.randn(3, 17, 24), Attention(24, 3, bias)
    held(layer, layer.fused(x), x)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_mlp_by_the_op_is_that_of_plain_pytorch(approximate, recompute):
    x, layer = torch.randn(3, 17, 24), Mlp(24, 2.5, approximate)
    held(layer, layer.fused(x, recompute), x)
