"""From the bytes of an image file to a square of pixels."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from erd_fast.errors import DataError

_MOST_PIXELS = 1 << 27  # of an enlarged image, most of which is cut off again


def decode(content: bytes, size: int) -> NDArray[np.uint8]:
    """The middle square of an image, (size, size, 3) RGB. Grey becomes RGB, transparency is dropped, 16 bits become 8,
    and an orientation in EXIF is not followed, as in ADM and DiT.

    Raises:
        Exception: of any kind that Pillow has for damaged files; DataError for those that are no images.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(centre_crop(_rgb(image), size))
    except UnidentifiedImageError:  # whose text has an address in it
        raise DataError("no image of a known format") from None


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM (arXiv 2105.05233): halved by averages while the shorter side is at least twice ``size``, then
    bicubic to ``size``, then the middle. Raises DataError for a strip, which would be enlarged beyond measure."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MOST_PIXELS:
        raise DataError(f"{image.width} x {image.height} pixels, too long for its width")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError("pixels are floats of no known range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of another way
    return image.convert("RGB")
