"""Samples of a store beside the images that they were made of, as a picture: does the autoencoder fit, and the crop?"""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_COLUMNS = 8
_SIDE = 128
_GAP = 4
_BETWEEN = 12  # pairs of rows


def contact_sheet(originals: Sequence[NDArray[np.uint8]], decoded: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG file: images (H, W, 3) in rows of eight, and under each row what was decoded."""
    rows = range(0, len(originals), _COLUMNS)
    columns = min(_COLUMNS, len(originals))
    pair = 2 * _SIDE + _GAP
    size = (columns * (_SIDE + _GAP) - _GAP, len(rows) * (pair + _BETWEEN) - _BETWEEN)
    sheet = Image.new("RGB", size, "white")
    for number, images in enumerate(zip(originals, decoded, strict=True)):
        row, column = divmod(number, _COLUMNS)
        for below, pixels in enumerate(images):
            tile = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * (_SIDE + _GAP), row * (pair + _BETWEEN) + below * (_SIDE + _GAP)))
    file = io.BytesIO()
    sheet.save(file, format="png", compress_level=1)
    return file.getvalue()
