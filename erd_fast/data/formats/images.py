"""Image collections as stores of pixels, without an autoencoder."""

import contextlib
from pathlib import Path

import numpy as np

from erd_fast.data.decoding import decode_ahead, parts
from erd_fast.data.formats.source import ROWS_AT_ONCE, Batches, ImportOptions, Source
from erd_fast.data.manifest import ADM_CROP
from erd_fast.data.pictures import Pictures, open_pictures
from erd_fast.errors import ConfigError, DataError


def open_images(src: Path, options: ImportOptions) -> Source:
    """Squares around the middle of each image, (3, size, size) uint8, mirrored at random in training unless told
    otherwise."""
    if options.size < 1:
        raise ConfigError(f"size: given {options.size}, allowed 1 or more")
    if options.flip == "stored":
        raise ConfigError("flip: given stored, allowed none, mirror: pixels are mirrored in training")
    pictures = open_pictures(src)
    return Source(
        _batches(src, pictures, options.size),
        kind="pixels",
        count=len(pictures),
        num_classes=pictures.num_classes,
        class_names=pictures.class_names,
        crop=ADM_CROP,
        flip=options.flip or "mirror",
    )


def _batches(src: Path, pictures: Pictures, size: int) -> Batches:
    everything = parts(range(len(pictures)), ROWS_AT_ONCE)
    with contextlib.closing(decode_ahead(pictures, everything, size)) as batches:
        for decoded in batches:
            if decoded.broken:
                name, reason = decoded.broken[0]
                raise DataError(f"{src}: {name} is damaged: {reason}")
            of_all = pictures.labels
            labels = [0 if of_all is None else of_all[i] for i in decoded.numbers]
            yield decoded.pixels.permute(0, 3, 1, 2).numpy(), np.array(labels, np.int64)
