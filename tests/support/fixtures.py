"""Small real inputs, written by ``make fixtures``: stores of each kind, IDX files, images, foreign formats."""

import functools
import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from erd_fast.data import LatentKind, LatentStore, write_store
from erd_fast.data.idx import IDX_NAMES
from erd_fast.data.importers import import_digits
from erd_fast.files import make_folder
from erd_fast.random import Purpose, Stream, normals
from support import foreign, pictures


def write_fixtures(folder: Path) -> list[Path]:
    """Write what is not there yet into ``folder``; returns the paths."""
    make_folder(folder)
    makers: dict[str, Callable[[Path], Any]] = {
        "digits": import_digits,
        "latents-sample": functools.partial(latent_store, kind="sample"),
        "latents-mean_std": functools.partial(latent_store, kind="mean_std"),
        "latents-mean_logvar": functools.partial(latent_store, kind="mean_logvar"),
        "idx": _idx_folder,
        "celeba": celeba_folder,
        **pictures.COLLECTIONS,
        "tiny_vae": pictures.tiny_vae,
        "erd.h5": foreign.erd_hdf5,
        "fast-dit": foreign.fast_dit,
        "uvit": foreign.uvit,
        "maskdit-lmdb": foreign.maskdit_lmdb,
        "maskdit-webdataset": foreign.maskdit_webdataset,
        "edm2.zip": foreign.edm2,
        "repa": foreign.repa,
        "lightningdit": foreign.lightningdit,
        "numpy": foreign.numpy_folder,
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            make(folder / name)
    return [folder / name for name in makers]


def latent_store(path: Path, kind: LatentKind, count: int = 256, shard_size: int = 100) -> LatentStore:
    """A store of random (4, 8, 8) latents of ``kind`` in fp16, in several shards, with scale and shift per channel."""
    mean = normals(0, Purpose.LAB, Stream.POSTERIOR, torch.arange(count), (4, 8, 8)) * 2.0 + 1.0
    spread = {"sample": None, "mean_std": 0.1, "mean_logvar": -4.6}[kind]
    stored = mean if spread is None else torch.cat((mean, torch.full_like(mean, spread)), dim=1)
    labels = torch.arange(count) % 10
    return write_store(
        path,
        [(stored.half(), labels)],
        kind=kind,
        num_classes=10,
        scale=(0.5,) * 4,
        shift=(1.0,) * 4,
        shard_size=shard_size,
    )


def _idx_folder(path: Path) -> None:
    """All digits, enlarged to 28 x 28, as the gzipped IDX files of MNIST."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = [Image.fromarray((pixels * (255 / 16)).round().astype("uint8")) for pixels in digits.images]
    images = np.stack([np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC)) for picture in small])
    make_folder(path)
    for name, array in zip(IDX_NAMES, (images, digits.target), strict=True):
        (path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))


def idx_bytes(array: NDArray[Any]) -> bytes:
    """An array of 0 to 255 as an IDX file."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def celeba_folder(path: Path, count: int = 40) -> None:
    """Pictures in the form of CelebA's aligned images, JPEG of 178 x 218: red is the column, green the row."""
    make_folder(path)
    columns, rows = np.meshgrid(np.arange(178), np.arange(218))
    for number in range(count):
        pixels = np.stack((columns, rows, np.full_like(rows, 6 * number)), axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{number + 1:06d}.jpg", quality=95)


if __name__ == "__main__":
    for written in write_fixtures(Path(sys.argv[1])):
        print(written)
