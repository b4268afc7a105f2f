"""CelebA's aligned faces into a store of 64 x 64 pixels.

The crop is the one of DDIM and U-ViT (arXiv 2010.02502, 2209.12152): of an aligned image, 178 wide and 218 high, the
128 x 128 pixels around column 89 and row 121, shrunk with antialiased bilinear weights. Models trained on other crops
do not compare by FID: ERD's public code shrinks the whole width and cuts the middle square out.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from erd_fast.data.store import LatentStore
from erd_fast.data.writer import write_store
from erd_fast.errors import DataError

ALIGNED = (178, 218)  # width, height
_BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)  # left, upper, right, lower
_SIDE = 64
_TRAINING = "0"  # of list_eval_partition.txt; 1 is validation, 2 is test
_AT_ONCE = 1024


def import_celeba(folder: Path, path: Path, partition: Path | None = None) -> LatentStore:
    """Write the JPEG files of ``folder`` (``img_align_celeba``), by name, as a store without classes.

    The pixels are (3, 64, 64) uint8, mirrored at random in training.

    Args:
        partition: CelebA's ``list_eval_partition.txt``, to import its training images alone.

    Raises:
        DataError: no images, an image that is damaged or no aligned one, or a partition that is damaged or names images
            that are not there.
    """
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise DataError(f"{folder}: found no *.jpg, allowed CelebA's folder img_align_celeba")
    if partition is not None:
        files = _training_files(folder, {file.name for file in files}, partition)
    print(f"importing {len(files)} images of {folder}", flush=True)
    crop = f"box {_BOX} of {ALIGNED[0]} x {ALIGNED[1]}, {_SIDE} x {_SIDE}"
    return write_store(path, _batches(files), kind="pixels", num_classes=0, flip="mirror", crop=crop)


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


def _batches(files: list[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), unit="image", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(files), _AT_ONCE):
            part = files[first : first + _AT_ONCE]
            pixels = torch.from_numpy(np.stack(list(pool.map(_face, part))))
            yield pixels.permute(0, 3, 1, 2).contiguous(), torch.zeros(len(part), dtype=torch.int64)
            bar.update(len(part))


def _face(file: Path) -> np.ndarray:
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
