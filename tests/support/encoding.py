"""Eleven images and an autoencoder, what is encoded of them, and how."""

import dataclasses
from pathlib import Path
from typing import Any

from erd_fast.data import LatentStore
from erd_fast.prepare.encode import EncodeOptions, encode

COUNT = 11
OPTIONS = EncodeOptions(size=32, batch_size=3, shard_size=4, workers=2)


def encode_given(given: Path, dst: Path, src: str = "images", vae: str = "vae", **options: Any) -> LatentStore | None:
    """Of the folder ``given``, which a fixture of that name makes."""
    return encode(given / src, dst, str(given / vae), dataclasses.replace(OPTIONS, **options))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
