"""Is a store what its manifest says, and is it what a model should be trained on?

People lose days to std read as log-variance, to a scale applied twice or never, and to files that overwrote each other:
all of it shows in the numbers.
"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erd_fast.data.check_picture import draw_statistics
from erd_fast.data.statistics import Statistics, digests, measure, measure_some, total
from erd_fast.data.store import LatentStore
from erd_fast.errors import DataError
from erd_fast.files import read_json, write_bytes
from erd_fast.progress import Progress

SCALED_STD = (0.5, 2.0)
"""Overall std of what a model is trained on that is taken for right. Schedules and weights are made for 1. Stable
Diffusion's scale of 0.18215 was chosen to give it: without it the std is near 1 / 0.18215 = 5.5, with it twice 0.18."""
_AT_ONCE = 512  # rows
_DUPLICATES = 0.001
"""Part of a store that may be equal to another row; photographs do come twice."""
_IMAGENET = 1_281_167


class Finding(NamedTuple):
    """Something about a store that is wrong (``error``), or that somebody should look at."""

    error: bool
    text: str


def check_store(path: str | Path, picture: Path | None = None) -> None:
    """Read all of a store, print what its numbers are like and what is wrong with them, and draw histograms.

    Compared or counted are: sizes and sums of shards, shapes, labels; numbers that are not finite, constant rows; mean
    and std of each channel as the model sees it; std taken for log-variance and the reverse; a scale that is missing or
    applied twice; equal rows; classes without samples; shards that the manifest does not know.

    Args:
        path: the store's folder.
        picture: PNG file for the histograms; None is ``<store>-check.png`` beside the store.

    Raises:
        DataError: something is wrong. RunError: the picture cannot be written.
    """
    store = LatentStore(path, verify=True)
    measured, rows = _measure_all(store)
    print(store.describe())
    print(_table(store, measured))
    findings = [*judge(store, measured), *_judge_rows(rows), *judge_labels(store), *_judge_folder(store)]
    findings += _judge_source(store)
    for finding in findings:
        print(f"{'error' if finding.error else 'warning'}: {finding.text}")
    picture = picture or _beside(store.path)
    write_bytes(picture, draw_statistics(store, measured))
    print(f"wrote {picture}")
    errors = [finding.text for finding in findings if finding.error]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise DataError(f"{store.path}: {errors[0]}{more}")
    print("passed")


def _beside(path: Path) -> Path:
    named = path if path.name not in ("", "..") else path.resolve()
    return named.with_name(f"{named.name}-check.png")


def check_scale(store: LatentStore) -> None:
    """The part of the check that takes a moment: some rows, spread over the store, must be finite and have a std as
    models expect it.

    Raises:
        DataError: they are not; the message says how to train all the same.
    """
    errors = [finding.text for finding in judge(store, measure_some(store)) if finding.error]
    if errors:
        raise DataError(
            f"data.path: {store.path}: {errors[0]}. `erd-fast data check` says more; --data.check off trains on it"
        )


def judge(store: LatentStore, measured: Statistics) -> list[Finding]:
    """What is wrong with these numbers for a store of this manifest."""
    found = list(_judge_finite(measured))
    if measured.per_channel and store.manifest.kind != "pixels":
        found += [*_judge_constant(measured), *_judge_second_half(store, measured), *_judge_scale(store, measured)]
    return found


def _judge_finite(measured: Statistics) -> Iterator[Finding]:
    if rows := measured.not_finite:
        yield Finding(True, f"{len(rows):,} of {measured.rows:,} samples are not finite, first sample {rows[0]}")


def _judge_constant(measured: Statistics) -> Iterator[Finding]:
    if rows := measured.constant:
        yield Finding(
            True,
            f"{len(rows):,} of {measured.rows:,} samples have one number everywhere, first sample {rows[0]}: "
            "they were never filled in",
        )


def _judge_second_half(store: LatentStore, measured: Statistics) -> Iterator[Finding]:
    kind, channels = store.manifest.kind, store.manifest.shape[0]
    if kind == "sample":
        if channels > 2 and channels % 2 == 0 and _looks_like_moments(measured):
            yield Finding(
                True,
                f"kind sample, and of its {channels} channels the second half has no number below 0, but much smaller "
                "ones than the first half: they are mean and std perhaps (kind mean_std)",
            )
        return
    low, high = float(measured.lowest[channels:].min()), float(measured.highest[channels:].max())
    lies = f"kind {kind}, and the second half of the channels lies in {low:.3g} to {high:.3g}"
    if kind == "mean_std" and low < 0:
        yield Finding(True, f"{lies}: that is no std, but log-variance perhaps (kind mean_logvar)")
    if kind == "mean_logvar" and low >= 0:
        yield Finding(True, f"{lies}: that is no log-variance of an autoencoder, but std perhaps (kind mean_std)")


def _looks_like_moments(measured: Statistics) -> bool:
    half = len(measured.lowest) // 2
    positive = float(measured.lowest[half:].min()) >= 0 > float(measured.lowest[:half].max())
    return positive and float(measured.highest[half:].max()) < float(measured.highest[:half].min())


def _judge_scale(store: LatentStore, measured: Statistics) -> Iterator[Finding]:
    low, high = SCALED_STD
    std = measured.overall_std
    if not low <= std <= high:
        yield Finding(True, f"std after scaling is {std:.3g}, allowed {low} to {high}{_why_scaled_so(store, std)}")
        return
    for channel, (mean, spread) in enumerate(zip(measured.mean.tolist(), measured.std.tolist(), strict=True)):
        if not low <= spread <= high:
            yield Finding(False, f"channel {channel} has std {spread:.3g} after scaling, usual are {low} to {high}")
        if abs(mean) > spread:
            yield Finding(
                False,
                f"channel {channel} has mean {mean:.3g} after scaling, more than its std {spread:.3g}:"
                " shift is missing, or the autoencoder was fed pixels of another range",
            )


def _why_scaled_so(store: LatentStore, std: float) -> str:
    scale = store.manifest.scale
    if not scale:
        return f": the manifest has no scale, and {1 / std:.3g} would make it 1" if std else ""
    applied = float(np.exp(np.mean(np.log(np.abs(scale))))) if all(scale) else 0.0
    low, high = SCALED_STD
    if applied and low <= std / applied <= high:
        return f": without the manifest's scale of {applied:.3g} it is {std / applied:.3g}: was it applied twice?"
    return f": the manifest's scale is {applied:.3g}, and {applied / std:.3g} would make it 1" if std else ""


def _judge_rows(rows: np.ndarray) -> Iterator[Finding]:
    _, first, inverse, counts = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    copies = np.flatnonzero(first[inverse] != np.arange(len(rows)))
    if len(copies):
        copy = int(copies[0])
        yield Finding(
            len(copies) > _DUPLICATES * len(rows),
            f"{len(copies):,} of {len(rows):,} samples are equal to another one, first sample {copy} and "
            f"{int(first[inverse[copy]])}; most often there are {int(counts.max())} of one",
        )


def judge_labels(store: LatentStore) -> Iterator[Finding]:
    """Classes without samples, and images that ImageNet has and a store of it has not."""
    manifest = store.manifest
    counts = torch.bincount(store.labels, minlength=manifest.num_classes)
    if manifest.num_classes and len(empty := (counts == 0).nonzero()):
        yield Finding(
            False, f"{len(empty):,} of {manifest.num_classes:,} classes have no sample, first class {int(empty[0])}"
        )
    images = manifest.count // 2 if manifest.flip == "stored" else manifest.count
    if manifest.num_classes == 1000 and 0 < abs(images - _IMAGENET) < _IMAGENET // 4:
        difference = f"{abs(images - _IMAGENET):,} {'fewer' if images < _IMAGENET else 'more'}"
        yield Finding(False, f"{images:,} images in 1000 classes, {difference} than ImageNet's training set has")


def _judge_folder(store: LatentStore) -> Iterator[Finding]:
    known = {shard.file for shard in store.manifest.shards}
    unknown = sorted(file.name for file in store.path.glob("shard-*.safetensors") if file.name not in known)
    if unknown:
        yield Finding(False, f"{unknown[0]} is not in the manifest (files like it: {len(unknown)})")
    names = Counter(shard.sha256 for shard in store.manifest.shards)
    if (repeated := len(store.manifest.shards) - len(names)) > 0:
        yield Finding(True, f"{repeated} shards have the content of another one")


def _judge_source(store: LatentStore) -> Iterator[Finding]:
    """What `data encode` noted."""
    note = store.path / "encode.json"
    broken = read_json(note).get("broken", []) if note.is_file() else []
    if broken:
        name, reason = broken[0]
        yield Finding(False, f"{len(broken):,} images were damaged and are left out, first {name} ({reason})")


def _measure_all(store: LatentStore) -> tuple[Statistics, np.ndarray]:
    """Statistics, and a hash of each row in order; several pieces at a time."""

    def look(piece: tuple[int, Tensor]) -> tuple[Statistics, np.ndarray]:
        first, latents = piece
        return measure(latents, first, store.manifest), digests(latents)

    parts, rows = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress("checking", "sample", len(store)) as progress:
        for part, hashes in pool.map(look, _pieces(store)):
            parts.append(part)
            rows.append(hashes)
            progress.count(len(hashes))
    return total(parts), np.concatenate(rows)


def _pieces(store: LatentStore) -> Iterator[tuple[int, Tensor]]:
    """(first row, mapped rows)."""
    first = 0
    for shard in store.shards():
        for piece in shard.split(_AT_ONCE):
            yield first, piece
            first += len(piece)


def _table(store: LatentStore, measured: Statistics) -> str:
    seen = "pixels, -1 to 1" if store.manifest.kind == "pixels" else "scaled"
    lines = [f"  channel, {seen:<18}{'mean':>10}{'std':>10}"]
    for channel, (mean, std) in enumerate(zip(measured.mean.tolist(), measured.std.tolist(), strict=True)):
        lines.append(f"  {channel:<27}{mean:>10.4f}{std:>10.4f}")
    return "\n".join([*lines, f"  {'all':<27}{float(measured.mean.mean()):>10.4f}{measured.overall_std:>10.4f}"])
