"""CelebA's aligned faces into a store of 64 x 64 pixels.

The crop is the one of DDIM and U-ViT (arXiv 2010.02502, 2209.12152): of an aligned image, 178 wide and 218 high, the
128 x 128 pixels around column 89 and row 121, shrunk with antialiased bilinear weights. Models trained on other crops
do not compare by FID: ERD's public code shrinks the whole width and cuts the middle square out.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from erd_fast.data.formats.source import Batches, ImportOptions, Source, in_batches
from erd_fast.errors import DataError

ALIGNED = (178, 218)  # width, height
_BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)  # left, upper, right, lower
_SIDE = 64
_TRAINING = "0"  # of list_eval_partition.txt; 1 is validation, 2 is test
_AT_ONCE = 1024


def open_celeba(src: Path, options: ImportOptions) -> Source:
    """The JPEG files of ``src`` (``img_align_celeba``), by name, without classes, mirrored at random in training.

    The pixels are (3, 64, 64) uint8. ``options.partition``, CelebA's ``list_eval_partition.txt``, chooses its training
    images.

    Raises:
        DataError: no images, an image that is damaged or no aligned one, or a partition that is damaged or names images
            that are not there.
    """
    files = sorted(src.glob("*.jpg"))
    if not files:
        raise DataError(f"{src}: found no *.jpg, allowed CelebA's folder img_align_celeba")
    if options.partition is not None:
        files = _training_files(src, {file.name for file in files}, options.partition)
    return Source(
        batches=_batches(files),
        kind="pixels",
        count=len(files),
        num_classes=0,
        crop=f"box {_BOX} of {ALIGNED[0]} x {ALIGNED[1]}, {_SIDE} x {_SIDE}",
        flip="mirror",
    )


def _training_files(folder: Path, there: set[str], partition: Path) -> list[Path]:
    """The files that a partition, lines "000001.jpg 0", counts to the training images."""
    try:
        lines = [line.split() for line in partition.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{partition} cannot be read: {error}") from error
    for number, words in enumerate(lines, 1):
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise DataError(
                f"{partition}: line {number}: given {' '.join(words)!r}, allowed a file's name and 0, 1 or 2"
            )
    names = sorted(name for name, part in lines if part == _TRAINING)
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{partition} names {len(missing)} training images that are not in {folder}, first {missing[0]}"
        )
    if not names:
        raise DataError(f"{partition} names no training image (0)")
    return [folder / name for name in names]


def _batches(files: list[Path]) -> Batches:
    for _, faces in in_batches(_face, files, _AT_ONCE):
        yield np.stack(faces).transpose(0, 3, 1, 2), np.zeros(len(faces), np.int64)


def _face(file: Path) -> NDArray[np.uint8]:
    """(64, 64, 3) uint8."""
    try:
        with Image.open(file) as image:
            if image.size != ALIGNED:
                raise DataError(
                    f"{file}: given {image.size[0]} x {image.size[1]} pixels, allowed aligned images of "
                    f"{ALIGNED[0]} x {ALIGNED[1]}"
                )
            return np.asarray(image.convert("RGB").crop(_BOX).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
