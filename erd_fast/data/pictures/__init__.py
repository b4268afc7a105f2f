"""Collections of images as people keep them, and what becomes of an image before it is encoded."""

from erd_fast.data.pictures.crop import decode
from erd_fast.data.pictures.open import open_pictures
from erd_fast.data.pictures.pictures import Pictures

__all__ = ["Pictures", "decode", "open_pictures"]
