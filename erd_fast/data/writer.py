"""Writing a latent store: batches of any sizes become shards, and the folder appears when it is whole."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from erd_fast.data.foreign import CLASSES
from erd_fast.data.manifest import STORED_DTYPES, Manifest, Shard
from erd_fast.data.store import LatentStore, sha256_of
from erd_fast.errors import DataError
from erd_fast.files import new_folder, whole_file, write_json
from erd_fast.latents import LatentKind, latent_channels

SHARD_SIZE = 65_536


def write_store(
    path: str | Path,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    kind: LatentKind,
    num_classes: int | None,
    shard_size: int = SHARD_SIZE,
    source: str = "",
    **described: Any,
) -> LatentStore:
    """Write a new store and open it. Of the data a shard is held in memory, no more.

    Args:
        path: folder to make; it must not exist.
        batches: (latents (n, C or 2C, H, W), labels (n,)) in order, of any sizes.
        kind: as in :class:`Manifest`.
        num_classes: as in :class:`Manifest`; None is the largest label and one.
        shard_size: samples of one shard.
        source: where the batches come from, for messages about them.
        described: further fields of :class:`Manifest` (class_names, scale, shift, vae, crop, flip, ...).

    Raises:
        DataError: the folder exists, nothing was given, or shapes, dtypes or labels are not allowed, or a number is not
            finite. RunError: the disk is full or may not be written.
    """
    path = Path(path)
    if shard_size < 1:
        raise DataError(f"shard_size: given {shard_size}, allowed 1 or more")
    refuse_existing(path)
    shards: list[Shard] = []
    example: Tensor | None = None
    largest = 0
    with new_folder(path) as folder:
        for latents, labels in _regroup(_checked(batches, num_classes, source), shard_size):
            example, largest = latents[:1], max(largest, int(labels.max()))
            shards.append(write_shard(folder, len(shards), latents, labels))
        if example is None:
            raise DataError(f"{path}: no samples given; a store holds at least one")
        classes = largest + 1 if num_classes is None else num_classes
        manifest = write_manifest(folder, shards, example, kind=kind, num_classes=classes, **described)
    store = LatentStore(path, verify=False)
    if store.manifest != manifest:
        raise DataError(f"{path} was made by another process meanwhile, of other data; name a new folder")
    return store


def refuse_existing(path: Path) -> None:
    """Raise DataError where something is there already."""
    if path.exists():
        raise DataError(f"{path} exists already; stores are never changed, so name a new folder")


def write_shard(folder: Path, number: int, latents: Tensor, labels: Tensor) -> Shard:
    """Write shard ``number``: latents (n, C or 2C, H, W) as they are, labels (n,) as int32.

    The file is whole or absent, and the same for the same numbers.
    """
    file = folder / f"shard-{number:05d}.safetensors"
    with whole_file(file) as partial:
        save_file({"latents": latents.contiguous(), "labels": labels.to(torch.int32).contiguous()}, partial)
    return Shard(file.name, len(latents), file.stat().st_size, sha256_of(file))


def write_manifest(
    folder: Path, shards: Sequence[Shard], example: Tensor, *, kind: LatentKind, num_classes: int, **described: Any
) -> Manifest:
    """Make a store of the shards in ``folder``, whose latents are like ``example`` (n, C or 2C, H, W).

    Raises:
        DataError: a field is not allowed, or the shards are no store.
    """
    channels, height, width = example.shape[1:]
    manifest = Manifest(
        kind=kind,
        shape=(latent_channels(kind, channels), height, width),
        dtype=str(example.dtype).removeprefix("torch."),
        count=sum(shard.count for shard in shards),
        num_classes=num_classes,
        shards=tuple(shards),
        **described,
    )
    write_json(folder / "manifest.json", dataclasses.asdict(manifest))
    return LatentStore(folder, verify=False).manifest  # a store that would not open is not kept


def _checked(
    batches: Iterable[tuple[Tensor, Tensor]], num_classes: int | None, source: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, each compared with the first: what a store holds has one shape and one dtype, labels that are
    classes (of any number where ``num_classes`` is None), and finite numbers. Raises DataError otherwise."""
    first: Tensor | None = None
    seen = 0
    for latents, labels in batches:
        first = latents if first is None else first
        try:
            _check_form(latents, labels, first)
            _check_labels(labels, num_classes, seen)
            _check_finite(latents, seen)
        except DataError as error:
            raise DataError(f"{source}: {error}" if source else str(error)) from None
        seen += len(latents)
        yield latents, labels


def _check_form(latents: Tensor, labels: Tensor, first: Tensor) -> None:
    if latents.dim() != 4 or tuple(labels.shape) != (len(latents),):
        raise DataError(
            f"given latents {tuple(latents.shape)} and labels {tuple(labels.shape)}; allowed (n, C, H, W) and (n,)"
        )
    if latents.shape[1:] != first.shape[1:] or latents.dtype != first.dtype:
        raise DataError(
            f"given latents {latents.dtype} {tuple(latents.shape)}, allowed those of the first batch: "
            f"{first.dtype} (n, {', '.join(map(str, first.shape[1:]))})"
        )
    if latents.dtype not in STORED_DTYPES.values():
        raise DataError(f"given latents {latents.dtype}, allowed {', '.join(STORED_DTYPES)}")


def _check_labels(labels: Tensor, num_classes: int | None, seen: int) -> None:
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"given labels {labels.dtype}, allowed whole numbers")
    limit = CLASSES if num_classes is None else max(num_classes, 1)
    wrong = ((labels < 0) | (labels >= limit)).nonzero()
    if len(wrong):
        row, allowed = int(wrong[0]), "0 alone, without classes" if num_classes == 0 else f"0 to {limit - 1}"
        raise DataError(f"given label {int(labels[row])} of sample {seen + row}, allowed {allowed}")


def _check_finite(latents: Tensor, seen: int) -> None:
    if latents.dtype == torch.uint8 or latents.isfinite().all():
        return
    row = int((~latents.isfinite()).flatten(1).any(1).nonzero()[0])
    why = "; float16 ends at 65504: choose another dtype" if latents.dtype == torch.float16 else ""
    raise DataError(f"the latents of sample {seen + row} are not finite, allowed finite numbers{why}")


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
