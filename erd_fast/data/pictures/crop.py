"""From the bytes of an image file to a square of pixels."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erd_fast.data.formats.source import ADM_CROP

CROP = ADM_CROP
"""What a manifest calls :func:`centre_crop`."""


def decode(content: bytes, size: int) -> NDArray[np.uint8]:
    """The middle square of an image, (size, size, 3) RGB. Grey becomes RGB, transparency is dropped, 16 bits become
    8, and an orientation in EXIF is not followed, as in ADM and DiT.

    Raises:
        Exception: of any kind that Pillow has for damaged or unknown files.
    """
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(centre_crop(_rgb(image), size))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM (arXiv 2105.05233): halved by averages while the shorter side is at least twice ``size``, then
    bicubic to ``size``, then the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of another way
    return image.convert("RGB")
