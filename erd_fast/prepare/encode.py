"""Images to latents, once: a store of what an autoencoder makes of a collection.

The work is cut into shards, each of which is a fixed range of the collection, and goes on in a hidden folder beside the
store to be (:mod:`erd_fast.prepare.unfinished`). A shard depends on its range alone, so the store is the same bytes
however often the work began anew, and on however many processes.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from erd_fast.autoencoder import Autoencoder, Posterior
from erd_fast.data.decoding import Broken, Decoded, decode_ahead, parts
from erd_fast.data.manifest import ADM_CROP, STORED_DTYPES, Shard
from erd_fast.data.pictures import Pictures, decode, open_pictures
from erd_fast.data.store import LatentStore
from erd_fast.data.writer import write_manifest, write_shard
from erd_fast.errors import ConfigError, DataError
from erd_fast.files import read_json, write_bytes, write_json
from erd_fast.latents import FloatKind
from erd_fast.numerics import Precision, explained_out_of_memory
from erd_fast.prepare.contact_sheet import contact_sheet
from erd_fast.prepare.unfinished import Unfinished
from erd_fast.progress import Progress
from erd_fast.random import Purpose, Stream, normals
from erd_fast.torchrun import own_device, own_place

_SHOWN = 16  # images of the contact sheet
_FREE = {"max_broken", "workers"}
"""Options that change no byte of a store."""
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """How images become latents."""

    size: int = 256
    """Pixels of a side: what is cut out of each image, around its middle (the crop of ADM and DiT)."""
    kind: FloatKind = "mean_std"
    """What is kept of the posterior: mean and std, mean and log-variance, or one draw, half as large."""
    flip: Literal["none", "stored"] = "none"
    """stored: each image is followed by its mirror image, encoded for itself."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the latents that are written."""
    precision: Precision = "tf32"
    """Of the autoencoder on a GPU; TensorFloat-32 has as many digits as float16."""
    batch_size: int = 32
    """Images at a time; with their mirror images twice as many."""
    shard_size: int = 16_384
    """Images of a shard: what is lost of the work when it is stopped, and what processes share it by."""
    seed: int = 0
    """Of kind sample."""
    max_broken: int = 100
    """Images that may be damaged; they are left out, and listed in the store's encode.json."""
    workers: int = 0
    """Threads that decode images; 0 is one for each core that this process has for itself."""

    def __post_init__(self) -> None:
        least = {"size": 1, "batch_size": 1, "shard_size": 1, "max_broken": 0, "workers": 0, "seed": 0}
        for name, smallest in least.items():
            if (given := getattr(self, name)) < smallest:
                raise ConfigError(f"{name}: given {given}, allowed {smallest} or more")


def encode(src: Path, dst: Path, vae: str, options: EncodeOptions | None = None) -> LatentStore | None:
    """Encode the images of ``src`` (:func:`open_pictures`) by the autoencoder ``vae`` (:class:`Autoencoder`) into a
    store ``dst``. The same call goes on where the last one ended.

    Under torchrun each process takes its share of the shards, and the last one to end makes the store.

    Returns:
        The store; None where shards are left to other processes.

    Raises:
        DataError: ``src`` or ``vae`` is missing, damaged or of another kind, more images are broken than are allowed,
            ``dst`` exists, or was begun with other settings. RunError: the disk or the GPU's memory is full, or another
            process is at work. ConfigError: an option does not fit.
    """
    options = options or EncodeOptions()
    pictures = open_pictures(src)
    autoencoder = Autoencoder(vae, own_device(), options.precision)
    if options.size % autoencoder.factor:
        raise ConfigError(
            f"size: given {options.size}, allowed multiples of {autoencoder.factor} with this autoencoder"
        )
    settings = _settings(src, pictures, autoencoder, options)
    work = Unfinished(dst)
    if _is_finished(dst, settings) and not work.folder.exists():
        print(f"{dst} is finished")
    elif not _make(_Job(src, pictures, autoencoder, options, work), settings):
        return None
    return LatentStore(dst, verify=False)


def _make(job: "_Job", settings: dict[str, Any]) -> bool:
    """Do this process's share, and what remains at the end. Whether the store is there."""
    rank, size, *_ = own_place()
    work = job.work
    advice = f"batch_size: given {job.options.batch_size}, and the GPU's memory is full: take a smaller one"
    with work.joined(rank) as joined, explained_out_of_memory(advice):
        if not _is_finished(work.dst, settings):  # by another process, meanwhile
            work.check_settings(settings)
            job.run(range(rank, len(job.ranges), size))
        last = work.leave(joined)
        if last and not _is_finished(work.dst, settings) and not job.missing():
            job.finish(settings)
            work.publish()
        there = _is_finished(work.dst, settings)
        if last and there:
            work.remove()
    if not there:
        print(f"{len(job.missing())} of {len(job.ranges)} shards are left to other processes")
    return there


class _Job:
    """The shards of one store."""

    def __init__(
        self, src: Path, pictures: Pictures, autoencoder: Autoencoder, options: EncodeOptions, work: Unfinished
    ):
        self.options, self.work = options, work
        self._src, self._pictures, self._autoencoder = src, pictures, autoencoder
        self.ranges = list(parts(range(len(pictures)), options.shard_size))

    def run(self, numbers: range) -> None:
        """Encode the shards ``numbers`` that are not there."""
        missing = self.missing(numbers)
        first = numbers.start == 0  # which speaks for all
        if first:
            classes = f"in {self._pictures.num_classes:,} classes" if self._pictures.labels else "without classes"
            print(f"encoding {len(self._pictures):,} images {classes} of {self._src}", flush=True)
        images = sum(len(self.ranges[number]) for number in numbers)
        done = images - sum(len(self.ranges[number]) for number in missing)
        batches = {number: list(parts(self.ranges[number], self.options.batch_size)) for number in missing}
        everything = itertools.chain.from_iterable(batches.values())
        ahead = decode_ahead(
            self._pictures,
            everything,
            self.options.size,
            workers=self.options.workers,
            pin=self._autoencoder.device.type == "cuda",
        )
        with (
            contextlib.closing(ahead) as decoded,
            Progress("encoding", "image", images, done, quiet=not first) as progress,
        ):
            encoded = _one_behind(self._begun(decoded))
            for number in missing:
                self._encode_shard(number, itertools.islice(encoded, len(batches[number])), progress)

    def missing(self, numbers: Iterable[int] | None = None) -> list[int]:
        """Those of the shards ``numbers``, or of all, that are to be made."""
        numbers = range(len(self.ranges)) if numbers is None else numbers
        return [number for number in numbers if self.work.note(number) is None]

    def finish(self, settings: dict[str, Any]) -> None:
        """Write what the store needs beside its shards, all of which are there."""
        self.work.tidy()
        notes = self._notes()
        broken = [Broken(*image) for note in notes for image in note["broken"]]
        self._check_broken(broken)
        shards = [Shard(**note["shard"]) for note in notes if note["shard"]]
        if not shards:
            raise DataError(f"{self._src}: all {len(self._pictures):,} images are broken, first {_told(broken[0])}")
        store = self.work.store
        write_json(store / "encode.json", {"settings": settings, "broken": broken})
        shape = next(note["shape"] for note in notes if note["shard"])
        write_manifest(
            store,
            shards,
            torch.empty(0, *shape, dtype=STORED_DTYPES[self.options.dtype]),
            kind=self.options.kind,
            num_classes=self._pictures.num_classes,
            class_names=self._pictures.class_names,
            scale=self._autoencoder.scale,
            shift=self._autoencoder.shift,
            vae=self._autoencoder.name,
            vae_source=self._autoencoder.source,
            crop=ADM_CROP,
            flip=self.options.flip,
        )
        write_bytes(store / "contact_sheet.png", self._contact_sheet({image.name for image in broken}))

    def _encode_shard(self, number: int, batches: Iterator[tuple[Decoded, "_Encoding"]], progress: Progress) -> None:
        latents: Tensor | None = None
        labels: list[int] = []
        broken: list[Broken] = []
        for decoded, encoding in batches:
            broken += decoded.broken
            if decoded.broken:
                before = [Broken(*image) for note in self._notes() for image in note["broken"]]
                self._check_broken([*before, *broken])
            if decoded.numbers:
                rows = self._checked(encoding.result(), decoded)
                if latents is None:
                    latents = torch.empty(self._views * len(self.ranges[number]), *rows.shape[1:], dtype=rows.dtype)
                latents[len(labels) : len(labels) + len(rows)] = rows
                labels += self._labels(decoded)
            progress.count(len(decoded.numbers) + len(decoded.broken))
        note: dict[str, Any] = {"shard": None, "shape": None, "broken": broken}
        if latents is not None:
            shard = write_shard(self.work.store, number, latents[: len(labels)], torch.tensor(labels))
            note |= {"shard": dataclasses.asdict(shard), "shape": list(latents.shape[1:])}
        self.work.write_note(number, note)

    def _begun(self, batches: Iterable[Decoded]) -> Iterator[tuple[Decoded, "_Encoding"]]:
        """Each batch with its latents on their way."""
        for decoded in batches:
            pixels = decoded.pixels.to(self._autoencoder.device, non_blocking=True)
            if self.options.flip == "stored":
                pixels = torch.stack((pixels, pixels.flip(2)), dim=1).flatten(0, 1)
            rows = self._kept(self._autoencoder.encode(pixels), decoded) if decoded.numbers else torch.empty(0)
            yield decoded, _Encoding(rows.to(STORED_DTYPES[self.options.dtype]))

    def _kept(self, posterior: Posterior, decoded: Decoded) -> Tensor:
        if self.options.kind == "mean_std":
            return torch.cat((posterior.mean, posterior.std), dim=1)
        if self.options.kind == "mean_logvar":
            return torch.cat((posterior.mean, posterior.logvar), dim=1)
        mean = posterior.mean
        rows = torch.tensor(decoded.numbers)[:, None] * self._views + torch.arange(self._views)
        ids = rows.flatten().to(mean.device)
        return mean + posterior.std * normals(
            self.options.seed, Purpose.ENCODE, Stream.POSTERIOR, ids, tuple(mean.shape[1:])
        )

    def _checked(self, rows: Tensor, decoded: Decoded) -> Tensor:
        wrong = (~rows.isfinite()).flatten(1).any(1).nonzero()
        if len(wrong):
            name = self._pictures.names[decoded.numbers[int(wrong[0]) // self._views]]
            raise DataError(
                f"{self._src}: the latents of {name} are not finite in {self.options.dtype}, made in "
                f"{self.options.precision}; allowed finite numbers: choose another dtype or precision"
            )
        return rows

    def _labels(self, decoded: Decoded) -> list[int]:
        of_all = self._pictures.labels
        return [0 if of_all is None else of_all[i] for i in decoded.numbers for _ in range(self._views)]

    @property
    def _views(self) -> int:
        return 2 if self.options.flip == "stored" else 1

    def _notes(self) -> list[dict[str, Any]]:
        """Of the shards that are finished."""
        return [note for number in range(len(self.ranges)) if (note := self.work.note(number)) is not None]

    def _check_broken(self, broken: list[Broken]) -> None:
        if len(broken) > self.options.max_broken:
            raise DataError(
                f"{self._src}: {len(broken):,} images are broken, allowed up to {self.options.max_broken} "
                f"(max_broken); first {_told(broken[0])}"
            )

    def _contact_sheet(self, broken: set[str]) -> bytes:
        """Images spread over the store, and what is decoded of their rows."""
        there = [i for i, name in enumerate(self._pictures.names) if name not in broken]
        chosen = sorted({round(n * (len(there) - 1) / (_SHOWN - 1)) for n in range(_SHOWN)})
        originals = [decode(self._pictures.read(there[place]), self.options.size) for place in chosen]
        rows = LatentStore(self.work.store, verify=False).gather(torch.tensor(chosen) * self._views)
        decoded = self._autoencoder.decode(rows[:, : self._autoencoder.channels])
        return contact_sheet(originals, list(decoded.numpy()))


class _Encoding:
    """Numbers on their way from the device to the CPU. Work that is begun after this one is not waited for."""

    def __init__(self, numbers: Tensor):
        self._done = torch.cuda.Event() if numbers.is_cuda else None
        if self._done is not None:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._done.record()
        self._numbers = numbers

    def result(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._numbers


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """Each item when the next one is there, so that a GPU always has something to do."""
    previous: list[_Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _told(image: Broken) -> str:
    return f"{image.name} ({image.reason})"


def _settings(src: Path, pictures: Pictures, autoencoder: Autoencoder, options: EncodeOptions) -> dict[str, Any]:
    """What the bytes of the store depend on."""
    fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE}
    return {
        "source": src.resolve().name,
        "images": len(pictures),
        "identity": pictures.identity,
        "vae": autoencoder.name,
        "crop": ADM_CROP,
        **fields,
    }


def _is_finished(dst: Path, settings: dict[str, Any]) -> bool:
    """Raises DataError where ``dst`` is something else."""
    if not dst.exists():
        return False
    note = dst / "encode.json"
    if not note.is_file() or read_json(note)["settings"] != settings:
        raise DataError(f"{dst} exists already; stores are never changed, so name a new folder")
    return True
