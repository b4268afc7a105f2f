"""Modules and functions that the models share; most are tested in the models that they are parts of."""

import pytest
import torch

from erd_fast.nn.blocks import unpatchify


@pytest.mark.parametrize(("side", "patch", "channels"), [(1, 3, 2), (3, 1, 2), (3, 2, 1), (4, 4, 3)])
def test_patches_go_where_their_token_is_and_values_where_their_pixel_is(side, patch, channels):
    tokens = torch.randn(2, side * side, patch * patch * channels)
    image = unpatchify(tokens, patch)
    assert image.shape == (2, channels, side * patch, side * patch)
    for row in range(side * patch):
        for column in range(side * patch):
            token = row // patch * side + column // patch
            first = (row % patch * patch + column % patch) * channels
            assert torch.equal(image[:, :, row, column], tokens[:, token, first : first + channels])
