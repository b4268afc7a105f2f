"""The formats that ``erd-fast data import`` knows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from erd_fast.data.formats.arrays import open_numpy
from erd_fast.data.formats.celeba import open_celeba
from erd_fast.data.formats.hdf5 import open_erd_hdf5
from erd_fast.data.formats.images import open_images
from erd_fast.data.formats.lightningdit import open_lightningdit
from erd_fast.data.formats.maskdit import open_maskdit_lmdb, open_maskdit_webdataset
from erd_fast.data.formats.npy_folders import open_fast_dit, open_uvit
from erd_fast.data.formats.npy_json import open_edm2, open_repa
from erd_fast.data.formats.source import ImportOptions, Source
from erd_fast.errors import ConfigError, DataError, unknown_name


class Format(NamedTuple):
    """A form in which others store data sets."""

    open: Callable[[Path, ImportOptions], Source]
    takes: frozenset[str]
    """Options that it has a use for."""
    about: str
    """In a line."""


_LATENTS = frozenset(("dtype", "num_classes", "vae", "scale", "shift"))

FORMATS: dict[str, Format] = {
    "erd-hdf5": Format(
        open_erd_hdf5,
        _LATENTS | {"split"},
        "HDF5 file of the official ERD code: train_latents (mean and std), train_labels.",
    ),
    "fast-dit": Format(
        open_fast_dit,
        _LATENTS,
        "folder with imagenet256_features and imagenet256_labels, of .npy files: samples, times 0.18215.",
    ),
    "uvit": Format(
        open_uvit,
        _LATENTS | {"allow_pickle"},
        "folder imagenet256_features of U-ViT, of pickled .npy files: mean and log-variance, label.",
    ),
    "maskdit-lmdb": Format(
        open_maskdit_lmdb,
        _LATENTS | {"split"},
        "LMDB folder of MaskDiT: mean and log-variance.",
    ),
    "maskdit-webdataset": Format(
        open_maskdit_webdataset,
        _LATENTS | {"allow_pickle", "flip"},
        "folder of MaskDiT's .tar files with pickles: mean and log-variance.",
    ),
    "edm2": Format(
        open_edm2,
        _LATENTS,
        "folder or .zip of .npy files with dataset.json: mean and std, of an autoencoder that saw pixels of 0 to 1.",
    ),
    "repa": Format(
        open_repa,
        _LATENTS,
        "likewise of REPA (the folder with vae-sd): mean and std, of an autoencoder that saw pixels of -1 to 1.",
    ),
    "lightningdit": Format(
        open_lightningdit,
        _LATENTS | {"allow_pickle", "multiplier"},
        "folder of latents_rank*_shard*.safetensors with latents_stats.pt: samples and their mirror images.",
    ),
    "numpy": Format(
        open_numpy,
        _LATENTS | {"kind", "flip", "labels"},
        ".npy file (N, C, H, W), .npz with latents and labels, or folder with latents.npy and labels.npy.",
    ),
    "images": Format(
        open_images,
        frozenset(("size", "flip")),
        "images as pixels, from all that `data encode` reads; the middle square of each.",
    ),
    "celeba": Format(
        open_celeba,
        frozenset(("partition",)),
        "CelebA's aligned images (img_align_celeba), cropped to 64 x 64 pixels.",
    ),
}


def describe_formats() -> str:
    """A paragraph each, for a person."""
    return "\n\n".join(f"{name}: {known.about}" for name, known in FORMATS.items())


def open_source(name: str, src: Path, options: ImportOptions) -> Source:
    """Open ``src`` as the format ``name``; little is read yet.

    Raises:
        ConfigError: the format is unknown, or an option is not for it.
        DataError: ``src`` is missing, damaged or in another format.
    """
    if name not in FORMATS:
        raise ConfigError(unknown_name("format", name, FORMATS))
    _check_options(name, options)
    if not src.exists():
        raise DataError(f"{src} does not exist")
    return FORMATS[name].open(src, options)


def _check_options(name: str, options: ImportOptions) -> None:
    for field in dataclasses.fields(options):
        given = getattr(options, field.name)
        if given != field.default and field.name not in FORMATS[name].takes:
            takers = ", ".join(other for other, known in FORMATS.items() if field.name in known.takes)
            raise ConfigError(f"{field.name}: given {given}, which {name} has no use for; formats that have: {takers}")
    if options.num_classes is not None and options.num_classes < 1:
        raise ConfigError(f"num_classes: given {options.num_classes}, allowed 1 or more")
