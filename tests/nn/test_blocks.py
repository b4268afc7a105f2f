"""Modules that the models share; most are tested in the models that they are parts of."""

import pytest
import torch

from erd_fast.nn.blocks import Attention, Mlp, PatchEmbed
from erd_fast.ops.layout import to_patches


def close(found: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Sums of ``terms`` products in another order."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= terms * 2.0**-24 * expected.abs().max() * 4


@pytest.mark.parametrize(("patch", "channels"), [(1, 3), (2, 4), (4, 1)])
def test_patches_are_embedded_by_a_product_as_by_a_convolution(patch, channels):
    images, embed = torch.randn(3, channels, 8, 8), PatchEmbed(patch, channels, 24)
    close(embed.fused(to_patches(images, patch)), embed(images), patch * patch * channels + 1)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_by_the_op_is_that_of_plain_pytorch(bias):
    x, layer = torch.randn(3, 17, 24), Attention(24, 3, bias)
    close(layer.fused(x), layer(x), 24 * 17)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_mlp_by_the_op_is_that_of_plain_pytorch(approximate, recompute):
    x, layer = torch.randn(3, 17, 24), Mlp(24, 2.5, approximate)
    close(layer.fused(x, recompute), layer(x), 24 + 60)
