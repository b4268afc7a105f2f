"""The manifest of a latent store: what its numbers mean, as a JSON file that is checked field by field."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from erd_fast.errors import DataError
from erd_fast.files import read_json
from erd_fast.latents import KINDS, LatentKind, stored_channels

FORMAT_VERSION = 1
Flip = Literal["none", "mirror", "stored"]
ADM_CROP = "adm-center"
"""Halved by averages until the shorter side is under twice the wanted one, then bicubic, then the middle square (the
crop of ADM, arXiv 2105.05233, which DiT, U-ViT, EDM2 and their successors use)."""

STORED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}
"""By the name that a manifest has for them."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a store."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the numbers of a store mean."""

    kind: LatentKind
    """``sample``, ``mean_std``, ``mean_logvar`` or ``pixels``."""
    shape: tuple[int, int, int]
    """(C, H, W) of one image as the model sees it; ``mean_*`` kinds store 2C channels."""
    dtype: str
    """float16, bfloat16, float32, or uint8 for pixels."""
    count: int
    """Number of samples."""
    num_classes: int
    """Labels lie in [0, num_classes); 0 for a store without classes."""
    class_names: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()
    """x0 = (z - shift) * scale per channel; empty is 1."""
    shift: tuple[float, ...] = ()
    """Empty is 0."""
    vae: str = ""
    """Which autoencoder made the latents; empty for pixels. NAME@HASH names its weights."""
    vae_source: str = ""
    """Where that autoencoder is, to decode what a model draws: a folder's absolute path as it was when the store was
    made, or an ID of the Hugging Face hub; empty when unknown."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the pixels that the autoencoder was fed. Stored ``pixels`` become -1 to 1."""
    crop: str = "none"
    flip: Flip = "none"
    """``mirror``: pixels are mirrored at random in training; ``stored``: mirrored copies are stored; ``none``."""
    shards: tuple[Shard, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def channels_stored(self) -> int:
        return stored_channels(self.kind, self.shape[0])


def read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    if not file.is_file():
        wanted = "manifest.json (nor the IDX files train-images-idx3-ubyte and train-labels-idx1-ubyte)"
        raise DataError(f"{path} is no latent store: it has no {wanted}")
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file}: given a JSON {type(content).__name__}, allowed an object")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(f"{file}: format_version {version}; this version of erd-fast reads {FORMAT_VERSION}")
    fields = {field.name: field for field in dataclasses.fields(Manifest)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    for name in sorted(required - content.keys()):
        raise DataError(f"{file}: field {name!r} is missing")
    for name in sorted(content.keys() - fields.keys()):
        raise DataError(f"{file}: unknown field {name!r}; allowed: {', '.join(fields)}")
    try:
        shards = tuple(Shard(**shard) for shard in content.pop("shards", ()))
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        manifest = Manifest(**values, shards=shards)
        _check_manifest(manifest, file)
    except TypeError as error:  # a value of another type than its field
        raise DataError(f"{file}: {error}") from error
    return manifest


def _check_manifest(manifest: Manifest, file: Path) -> None:
    def check(field: str, right: bool, allowed: str) -> None:
        if not right:
            raise DataError(f"{file}: {field}: given {getattr(manifest, field)!r}, allowed {allowed}")

    shape = manifest.shape
    check("kind", manifest.kind in KINDS, ", ".join(KINDS))
    check("flip", manifest.flip in get_args(Flip), ", ".join(get_args(Flip)))
    check("dtype", manifest.dtype in STORED_DTYPES, ", ".join(STORED_DTYPES))
    check("dtype", (manifest.dtype == "uint8") == (manifest.kind == "pixels"), "uint8 for pixels and for them alone")
    is_shape = isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)
    check("shape", is_shape, "three positive whole numbers (C, H, W)")
    check("num_classes", isinstance(manifest.num_classes, int) and manifest.num_classes >= 0, "0 or more")
    for shard in manifest.shards:
        named = isinstance(shard.file, str) and Path(shard.file).name == shard.file
        counted = type(shard.count) is int and type(shard.bytes) is int and shard.count > 0
        check("shards", named and counted, "file names in the store's own folder, with whole counts above 0")
    total = sum(shard.count for shard in manifest.shards)
    check("count", manifest.count == total and total > 0, f"the sum of the shards' counts, {total}, at least 1")
    for field in ("scale", "shift"):
        given = getattr(manifest, field)
        check(field, are_numbers(given), "a list of numbers")
        check(field, len(given) in (0, shape[0]), f"one number for each of {shape[0]} channels, or none")
        check(field, not (given and manifest.kind == "pixels"), "none for pixels, which become -1 to 1")
    for field in ("vae", "vae_source"):
        check(field, isinstance(getattr(manifest, field), str), "text")
    check("pixel_range", is_range(manifest.pixel_range), "two numbers, the smaller one first")
    check("class_names", isinstance(manifest.class_names, tuple), "a list of names")
    names = len(manifest.class_names)
    check("class_names", names in (0, manifest.num_classes), f"{manifest.num_classes} names or none")


def are_numbers(value: Any) -> bool:
    """Whether a JSON value is a list of finite numbers that float32 can hold."""
    return isinstance(value, list | tuple) and all(
        isinstance(item, int | float) and abs(item) <= torch.finfo(torch.float32).max for item in value
    )


def is_range(value: Any) -> bool:
    """Whether a JSON value is two numbers, the smaller one first."""
    return are_numbers(value) and len(value) == 2 and value[0] < value[1]
