"""Folders of one .npy file an image: fast-DiT's and U-ViT's.

::

    fast-dit    imagenet256_features/0.npy (1, 4, 32, 32) float32    a sample of the posterior, times 0.18215
                imagenet256_labels/0.npy   (1,) int64
    uvit        0.npy    a pickled pair: moments (8, 32, 32) float32, mean and log-variance; label
"""

import functools
import io
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erd_fast.data.foreign import class_number, reading
from erd_fast.data.formats.npy import read_header, read_npy
from erd_fast.data.formats.pickled import load_numbers
from erd_fast.data.formats.source import (
    SD_SCALE,
    Batches,
    ImportOptions,
    Source,
    as_floats,
    as_labels,
    in_batches,
    need_pickles,
    stacked,
    warn_of_gaps,
)
from erd_fast.data.manifest import ADM_CROP
from erd_fast.errors import DataError

IMAGENET = 1_281_167
_FEATURES, _LABELS = "_features", "_labels"


def open_fast_dit(src: Path, options: ImportOptions) -> Source:
    """Samples, whose scale of 0.18215 is undone: the store holds what the autoencoder gave. Whether an image was
    mirrored was drawn once, for good.

    ``src`` is the folder of the two folders, or the one with the features. Files are paired by name, and come in the
    order of fast-DiT's loader: names sorted as text, so 0, 1, 10, 100 ...
    """
    features, labels = _fast_dit_folders(src)
    names = _paired_names(features, labels)
    warn_of_gaps((int(stem) for name in names if (stem := name.removesuffix(".npy")).isdecimal()), f"{features}/*.npy")
    _warn_of_overwriting(len(names), features)
    return Source(
        batches=_fast_dit_batches(features, labels, names),
        kind="sample",
        count=len(names),
        scale=(SD_SCALE,),
        crop=ADM_CROP,
    )


def open_uvit(src: Path, options: ImportOptions) -> Source:
    """Mean and log-variance, scaled by 0.18215, in the order of the numbers in the files' names.

    U-ViT's extraction stores the mirrored copies too: of every 256 images, first those and then their mirror images.
    """
    need_pickles(options, "the files of uvit are pickles")
    numbers = _uvit_numbers(src)
    warn_of_gaps(numbers, f"{src}/*.npy")
    return Source(
        batches=_uvit_batches(src, numbers),
        kind="mean_logvar",
        count=len(numbers),
        scale=(SD_SCALE,),
        crop=ADM_CROP,
        flip="stored",
    )


def _fast_dit_folders(src: Path) -> tuple[Path, Path]:
    """The features, and the labels beside them."""
    _need_folder(src, "imagenet256_features and imagenet256_labels")
    found = [src] if src.name.endswith(_FEATURES) else sorted(path for path in src.glob(f"*{_FEATURES}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{src}: found {names}, allowed one folder NAME{_FEATURES} with a folder NAME{_LABELS}")
    features = found[0]
    labels = features.with_name(features.name.removesuffix(_FEATURES) + _LABELS)
    for folder in (features, labels):
        _need_folder(folder, "the files 0.npy, 1.npy ...")
    return features, labels


def _need_folder(path: Path, content: str) -> None:
    if not path.is_dir():
        raise DataError(f"{path} is no folder, allowed one with {content}")


def _paired_names(features: Path, labels: Path) -> list[str]:
    """Names of the files that are in both folders, which must be all."""
    left, right = _npy_names(features), _npy_names(labels)
    if not left and not right:
        raise DataError(f"{features} has no .npy files, allowed 0.npy, 1.npy ...")
    for there, other, folder, without in ((left, right, features, labels), (right, left, labels, features)):
        alone = sorted(there - other)
        if alone:
            raise DataError(f"{folder} has {alone[0]} and {without} does not (files like it: {len(alone):,})")
    return sorted(left)


def _npy_names(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(".npy")}


def _warn_of_overwriting(count: int, features: Path) -> None:
    """fast-DiT of March 2025 numbers the files of each GPU from 0, so several GPUs overwrite each other's."""
    for gpus in range(2, 65):
        if count == math.ceil(IMAGENET / gpus):
            warnings.warn(
                f"{features}: {count:,} files are 1 of {gpus} parts of ImageNet: fast-DiT's extraction on {gpus} GPUs "
                "overwrites files, then features may even lie beside labels of other images",
                stacklevel=2,
            )
            return


def _fast_dit_batches(features: Path, labels: Path, names: list[str]) -> Batches:
    def read(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        file, label = f"{features}/{name}", f"{labels}/{name}"
        return as_floats(read_npy(_content(file), file), file), as_labels(read_npy(_content(label), label), label)

    example: tuple[int, ...] | None = None
    for part, pairs in in_batches(read, names):
        latents, classes = zip(*pairs, strict=True)
        example = example or latents[0].shape
        if len(example) != 4 or example[0] != 1:
            raise DataError(f"{features}/{part[0]}: given an array {example}, allowed (1, 4, 32, 32)")
        scaled = stacked(latents, [f"{features}/{name}" for name in part], example)[:, 0]
        yield (
            scaled / np.float64(SD_SCALE),  # rounded once, whatever the files have
            stacked(classes, [f"{labels}/{name}" for name in part], (1,))[:, 0],
        )


def _content(file: str) -> bytes:
    with reading(file), open(file, "rb") as stream:
        return stream.read()


def _uvit_numbers(src: Path) -> list[int]:
    _need_folder(src, "the files 0.npy, 1.npy ...")
    numbers = sorted(int(name[:-4]) for name in _npy_names(src) if re.fullmatch(r"(0|[1-9]\d*)\.npy", name))
    if not numbers:
        raise DataError(f"{src} has no files 0.npy, 1.npy ...")
    return numbers


def _uvit_batches(src: Path, numbers: list[int]) -> Batches:
    example: tuple[int, ...] | None = None
    for part, pairs in in_batches(functools.partial(_uvit_pair, src), numbers):
        example = example or pairs[0][0].shape
        latents = stacked([moments for moments, _ in pairs], [src / f"{number}.npy" for number in part], example)
        yield latents, np.array([label for _, label in pairs])


def _uvit_pair(src: Path, number: int) -> tuple[NDArray[Any], int]:
    """Moments (2C, H, W) and the label."""
    file = src / f"{number}.npy"
    stream = io.BytesIO(_content(str(file)))
    if not read_header(stream, file).dtype.hasobject:
        raise DataError(f"{file}: given an array of numbers, allowed a pickled pair (moments, label)")
    pair = load_numbers(stream.read(), file)
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], np.ndarray) or pair[0].ndim != 3:
        raise DataError(f"{file}: given a pickle of something else, allowed a pair: moments (8, 32, 32) and label")
    return as_floats(pair[0], file), class_number(int(as_labels(np.asarray(pair[1]), file)), file)
