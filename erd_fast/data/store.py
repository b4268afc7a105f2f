"""The latent store: a folder of safetensors shards and a manifest that says what their numbers mean.

::

    manifest.json              everything a reader needs to know; sha256 of every shard
    shard-00000.safetensors    latents (n, C or 2C, H, W) fp16 | bf16 | fp32 | uint8, labels (n,) int32
    shard-00001.safetensors    ...

Stores are written once, into a hidden folder that is renamed when whole, and never changed. No pickle anywhere.
"""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from erd_fast.errors import DataError
from erd_fast.files import new_folder, read_json, write_json

FORMAT_VERSION = 1
LatentKind = Literal["sample", "mean_std", "mean_logvar", "pixels"]
Flip = Literal["none", "mirror", "stored"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}
_STORED_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "U8": "uint8", "I32": "int32"}
_NUMPY_TYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "uint8": "u1", "int32": "<i4"}
_HASH_AT_OPEN = 1 << 30  # bytes; larger stores are hashed on request, sizes and headers are always checked


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
    """Which autoencoder made the latents; empty for pixels."""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the pixels that the autoencoder was fed. Stored ``pixels`` become -1 to 1."""
    crop: str = "none"
    flip: Flip = "none"
    """``mirror``: pixels are mirrored at random in training; ``stored``: mirrored copies are stored; ``none``."""
    shards: tuple[Shard, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def channels_stored(self) -> int:
        return self.shape[0] * (2 if self.kind.startswith("mean_") else 1)


class LatentStore:
    """A store on disk, opened for reading. Opening checks the manifest, every shard's header and size, and the labels.

    Args:
        path: the store's folder.
        verify: compare every shard with its sha256; None does so for stores of up to 1 GiB.

    Raises:
        DataError: the folder is no store, or a shard is missing, truncated, altered, or not of the manifest's form.
    """

    def __init__(self, path: str | Path, verify: bool | None = None):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self._first_rows = np.cumsum([0, *(shard.count for shard in self.manifest.shards)])
        mapped = [self._map_shard(shard) for shard in self.manifest.shards]
        self._latents = [latents for latents, _ in mapped]
        self.labels = torch.cat([labels for _, labels in mapped]).long()
        self._check_labels()
        total = sum(shard.bytes for shard in self.manifest.shards)
        if verify if verify is not None else total <= _HASH_AT_OPEN:
            self.verify()

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def fingerprint(self) -> str:
        """Identity of the content: a hash of the manifest without names and origins."""
        content = dataclasses.asdict(self.manifest)
        meaning = {key: content[key] for key in ("kind", "shape", "dtype", "scale", "shift", "flip", "num_classes")}
        sums = [shard.sha256 for shard in self.manifest.shards]
        return hashlib.sha256(json.dumps([meaning, sums]).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The manifest as lines for a person; fields that say nothing are left out."""
        manifest = self.manifest
        shape = " x ".join(map(str, manifest.shape))
        lines = {
            "samples": f"{manifest.count:,}",
            "kind": f"{manifest.kind}, {manifest.dtype}, {shape}",
            "classes": f"{manifest.num_classes:,}" if manifest.num_classes else "none",
            "flip": manifest.flip,
            "crop": manifest.crop,
            "scale": ", ".join(map(str, manifest.scale)),
            "shift": ", ".join(map(str, manifest.shift)),
            "vae": manifest.vae,
            "shards": f"{len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards):,} bytes",
            "fingerprint": self.fingerprint,
        }
        return "\n".join([str(self.path), *(f"  {name:<13}{value}" for name, value in lines.items() if value)])

    def verify(self) -> None:
        """Compare every shard with its sha256. Raises DataError naming the first that differs."""
        for shard in self.manifest.shards:
            found = _sha256(self.path / shard.file)
            if found != shard.sha256:
                raise DataError(
                    f"{self.path / shard.file} was altered: sha256 {found[:12]}..., the manifest says "
                    f"{shard.sha256[:12]}...; restore the file or make the store again"
                )

    def gather(self, index: Tensor) -> Tensor:
        """Stored rows of ``index`` ((N,) int64), copied from the mapped files: (N, C or 2C, H, W)."""
        if len(self._latents) == 1:
            return self._latents[0][index]
        rows = torch.empty((len(index), *self._latents[0].shape[1:]), dtype=self._latents[0].dtype)
        shard_of = np.searchsorted(self._first_rows, index.numpy(), side="right") - 1
        for number in np.unique(shard_of):
            places = torch.from_numpy(np.flatnonzero(shard_of == number))
            rows[places] = self._latents[number][index[places] - int(self._first_rows[number])]
        return rows

    def shards(self) -> Iterator[Tensor]:
        """The mapped latents of each shard in turn."""
        return iter(self._latents)

    def _map_shard(self, shard: Shard) -> tuple[Tensor, Tensor]:
        file = self.path / shard.file
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{file} is missing; the manifest lists it") from None
        if size != shard.bytes:
            raise DataError(f"{file} is truncated or altered: {size} bytes, the manifest says {shard.bytes}")
        manifest = self.manifest
        latents = _map_tensor(
            file, "latents", manifest.dtype, (shard.count, manifest.channels_stored, *manifest.shape[1:])
        )
        return latents, _map_tensor(file, "labels", "int32", (shard.count,))

    def _check_labels(self) -> None:
        limit = self.manifest.num_classes
        wrong = (self.labels < 0) | (self.labels >= max(limit, 1))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            allowed = f"0 to {limit - 1}" if limit else "0 alone, the store has no classes"
            raise DataError(f"{self.path}: label {int(self.labels[row])} of sample {row}; allowed {allowed}")


def write_store(
    path: str | Path,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    kind: LatentKind,
    num_classes: int,
    shard_size: int = 65_536,
    **described: Any,
) -> LatentStore:
    """Write a new store and open it.

    Args:
        path: folder to make; it must not exist.
        batches: (latents (n, C or 2C, H, W), labels (n,)) in order, of any sizes.
        kind, num_classes: as in :class:`Manifest`.
        shard_size: samples of one shard.
        described: further fields of :class:`Manifest` (class_names, scale, shift, vae, crop, flip, ...).

    Raises:
        DataError: the folder exists, nothing was given, or shapes, dtypes or labels are not allowed.
    """
    path = Path(path)
    if shard_size < 1:
        raise DataError(f"shard_size: given {shard_size}, allowed 1 or more")
    if path.exists():
        raise DataError(f"{path} exists already; stores are never changed, so name a new folder")
    shards: list[Shard] = []
    example: Tensor | None = None
    with new_folder(path) as folder:
        for latents, labels in _regroup(_checked(batches, num_classes), shard_size):
            example = latents
            file = folder / f"shard-{len(shards):05d}.safetensors"
            save_file({"latents": latents.contiguous(), "labels": labels.to(torch.int32).contiguous()}, file)
            shards.append(Shard(file.name, len(latents), file.stat().st_size, _sha256(file)))
        if example is None:
            raise DataError(f"{path}: no samples given; a store holds at least one")
        channels, height, width = example.shape[1:]
        manifest = Manifest(
            kind=kind,
            shape=(channels // (2 if kind.startswith("mean_") else 1), height, width),
            dtype=str(example.dtype).removeprefix("torch."),
            count=sum(shard.count for shard in shards),
            num_classes=num_classes,
            shards=tuple(shards),
            **described,
        )
        write_json(folder / "manifest.json", dataclasses.asdict(manifest))
        LatentStore(folder, verify=False)  # a store that would not open is not kept
    return LatentStore(path, verify=False)


def _checked(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each compared with the first: what a store holds has one shape and one dtype."""
    first: Tensor | None = None
    seen = 0
    for latents, labels in batches:
        first = latents if first is None else first
        if latents.dim() != 4 or tuple(labels.shape) != (len(latents),):
            raise DataError(
                f"given latents {tuple(latents.shape)} and labels {tuple(labels.shape)}; allowed (n, C, H, W) and (n,)"
            )
        if latents.shape[1:] != first.shape[1:] or latents.dtype != first.dtype:
            raise DataError(
                f"given latents {latents.dtype} {tuple(latents.shape)}, allowed those of the first batch: "
                f"{first.dtype} (n, {', '.join(map(str, first.shape[1:]))})"
            )
        if latents.dtype not in _DTYPES.values():
            raise DataError(f"given latents {latents.dtype}, allowed {', '.join(_DTYPES)}")
        if labels.is_floating_point() or labels.is_complex():
            raise DataError(f"given labels {labels.dtype}, allowed whole numbers")
        wrong = ((labels < 0) | (labels >= max(num_classes, 1))).nonzero()
        if len(wrong):
            row, allowed = int(wrong[0]), f"0 to {num_classes - 1}" if num_classes > 0 else "0 alone, without classes"
            raise DataError(f"given label {int(labels[row])} of sample {seen + row}, allowed {allowed}")
        seen += len(latents)
        yield latents, labels


def _regroup(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    held = 0
    for more_latents, more_labels in batches:
        latents.append(more_latents)
        labels.append(more_labels)
        held += len(more_latents)
        while held >= size:
            all_latents, all_labels = torch.cat(latents), torch.cat(labels)
            yield all_latents[:size], all_labels[:size]
            latents, labels, held = [all_latents[size:]], [all_labels[size:]], held - size
    if held:
        yield torch.cat(latents), torch.cat(labels)


def _read_manifest(path: Path) -> Manifest:
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
    check("kind", manifest.kind in get_args(LatentKind), ", ".join(get_args(LatentKind)))
    check("flip", manifest.flip in get_args(Flip), ", ".join(get_args(Flip)))
    check("dtype", manifest.dtype in _DTYPES, ", ".join(_DTYPES))
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
        check(field, isinstance(given, tuple) and all(map(_is_finite, given)), "a list of numbers")
        check(field, len(given) in (0, shape[0]), f"one number for each of {shape[0]} channels, or none")
        check(field, not (given and manifest.kind == "pixels"), "none for pixels, which become -1 to 1")
    check("class_names", isinstance(manifest.class_names, tuple), "a list of names")
    names = len(manifest.class_names)
    check("class_names", names in (0, manifest.num_classes), f"{manifest.num_classes} names or none")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _map_tensor(file: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor over the file's pages: nothing is read until it is touched, and processes share the page cache."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        entry = header[name]
        found, stored, (begin, end) = tuple(entry["shape"]), _STORED_NAMES.get(entry["dtype"]), entry["data_offsets"]
        if found != shape or stored != dtype:
            raise DataError(f"{file}: {name}: given {entry['dtype']} {found}, the manifest says {dtype} {shape}")
        # Mode "c" maps privately: torch wants memory it may write to, and nothing may reach the file.
        array = np.memmap(file, _NUMPY_TYPES[dtype], mode="c", offset=8 + length + begin, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, OverflowError) as error:
        raise DataError(f"{file} has no readable tensor {name!r}: the shard was altered ({error!r})") from error
    if array.nbytes != end - begin:
        raise DataError(f"{file}: {name}: {end - begin} bytes for {dtype} {shape}: the shard was altered")
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
