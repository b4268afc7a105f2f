"""Images to latents, once: a store of what an autoencoder makes of a collection.

The work is cut into shards, each of which is a fixed range of the collection. It goes on in a hidden folder beside the
store to be, where what is finished stays, whatever ends the process::

    .STORE.encoding/settings.json               what must not change between two tries
                    rank-0.lock                 held while a process works
                    shard-00000.json            a shard that is finished, and what was broken in it
                    store/shard-00000.safetensors ...

When all shards are there, ``store`` becomes the store by one rename. A shard depends on its range alone, so the store
is the same bytes however often the work began anew, and on however many processes.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from erd_fast.data.autoencoder import Autoencoder, Encoding, Precision
from erd_fast.data.contact_sheet import contact_sheet
from erd_fast.data.decoding import Decoded, Decoder
from erd_fast.data.manifest import DTYPES, Shard
from erd_fast.data.pictures import CROP, Pictures, decode, open_pictures
from erd_fast.data.progress import Progress
from erd_fast.data.store import LatentStore
from erd_fast.data.writer import SHARD_SIZE, checked, write_manifest, write_shard
from erd_fast.errors import ConfigError, DataError, RunError
from erd_fast.files import make_folder, publish, read_json, remove_partial, write_bytes, write_json
from erd_fast.random import Purpose, Stream, normals

_SHOWN = 16  # images of the contact sheet
_FREE = {"max_broken", "workers"}
"""Options that change no byte of a store."""
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """How images become latents."""

    size: int = 256
    """Pixels of a side: what is cut out of each image, around its middle (the crop of ADM and DiT)."""
    kind: Literal["mean_std", "mean_logvar", "sample"] = "mean_std"
    """What is kept of the posterior: mean and std, mean and log-variance, or one draw, half as large."""
    flip: Literal["none", "stored"] = "none"
    """stored: each image is followed by its mirror image, encoded for itself."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the latents that are written."""
    precision: Precision = "tf32"
    """Of the autoencoder on a GPU; TensorFloat-32 has as many digits as float16."""
    batch_size: int = 32
    """Images at a time."""
    shard_size: int = SHARD_SIZE
    """Images of a shard, after which the work can go on."""
    seed: int = 0
    """Of kind sample."""
    max_broken: int = 100
    """Images that may be damaged; they are left out, and listed in the store's encode.json."""
    workers: int = 0
    """Threads that decode images; 0 is one for each core."""

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
        The store; None where other processes are still at work.

    Raises:
        DataError: ``src`` or ``vae`` is missing, damaged or of another kind, more images are broken than are allowed,
            ``dst`` exists, or was begun with other settings. RunError: the disk is full, or another process is at work.
    """
    options = options or EncodeOptions()
    pictures = open_pictures(src)
    autoencoder = Autoencoder(vae, _device(), options.precision)
    if options.size % autoencoder.factor:
        raise ConfigError(
            f"size: given {options.size}, allowed multiples of {autoencoder.factor} with this autoencoder"
        )
    settings = _settings(src, pictures, autoencoder, options)
    if (finished := _finished(dst, settings)) is not None:
        return finished
    work = make_folder(_work_folder(dst))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with _only_process(work / f"rank-{rank}.lock", dst):
        _check_settings(work / "settings.json", settings, dst)
        job = _Job(pictures, autoencoder, options, work, src)
        job.run(range(rank, len(job.ranges), size))
        if not job.is_complete() and not dst.exists():
            return None
        with _last_process(work, dst) as last:
            if last:
                job.finish(settings)
                publish(work / "store", dst)
                shutil.rmtree(work, ignore_errors=True)
    return LatentStore(dst, verify=False)


class _Job:
    """The shards of one store."""

    def __init__(self, pictures: Pictures, autoencoder: Autoencoder, options: EncodeOptions, work: Path, src: Path):
        self._pictures, self._autoencoder, self._options, self._src = pictures, autoencoder, options, src
        self._work, self._store = work, make_folder(work / "store")
        firsts = range(0, len(pictures), options.shard_size)
        self.ranges = [range(first, min(first + options.shard_size, len(pictures))) for first in firsts]

    def run(self, numbers: range) -> None:
        """Encode the shards ``numbers`` that are not there."""
        missing = [number for number in numbers if not self._note(number).is_file()]
        images = sum(len(self.ranges[number]) for number in numbers)
        done = images - sum(len(self.ranges[number]) for number in missing)
        quiet = numbers.start > 0  # the first process speaks for all
        with (
            Decoder(self._pictures, self._options.size, self._options.workers) as decoder,
            Progress("encoding", images, done, quiet=quiet) as progress,
        ):
            for number in missing:
                self._encode_shard(number, decoder, progress)

    def is_complete(self) -> bool:
        return all(self._note(number).is_file() for number in range(len(self.ranges)))

    def finish(self, settings: dict[str, Any]) -> None:
        """Write what the store needs beside its shards."""
        remove_partial(self._store)  # of processes that were killed
        notes = [read_json(self._note(number)) for number in range(len(self.ranges))]
        broken = [image for note in notes for image in note["broken"]]
        self._check_broken(broken)
        shards = [Shard(**note["shard"]) for note in notes if note["shard"]]
        if not shards:
            raise DataError(f"{self._src}: all {len(self._pictures):,} images are broken, first {_told(broken[0])}")
        write_json(self._store / "encode.json", {"settings": settings, "broken": broken})
        shape = next(note["shape"] for note in notes if note["shard"])
        write_manifest(
            self._store,
            shards,
            torch.empty(0, *shape, dtype=DTYPES[self._options.dtype]),
            kind=self._options.kind,
            num_classes=self._pictures.num_classes,
            class_names=self._pictures.class_names,
            scale=self._autoencoder.scale,
            shift=self._autoencoder.shift,
            vae=self._autoencoder.name,
            crop=CROP,
            flip=self._options.flip,
        )
        write_bytes(self._store / "contact_sheet.png", self._contact_sheet({name for name, _ in broken}))

    def _note(self, number: int) -> Path:
        return self._work / f"shard-{number:05d}.json"

    def _encode_shard(self, number: int, decoder: Decoder, progress: Progress) -> None:
        images = self.ranges[number]
        latents: Tensor | None = None
        labels: list[int] = []
        broken: list[tuple[str, str]] = []
        for decoded, encoding in _one_behind(self._begun(decoder.batches(images, self._options.batch_size))):
            broken += decoded.broken
            if decoded.broken:
                self._check_broken([*self._broken_before(), *broken])
            if decoded.images:
                rows, classes = self._rows(decoded, encoding.result())
                if latents is None:
                    latents = torch.empty(self._views * len(images), *rows.shape[1:], dtype=rows.dtype)
                latents[len(labels) : len(labels) + len(rows)] = rows
                labels += classes.tolist()
            progress.count(len(decoded.images) + len(decoded.broken))
        note: dict[str, Any] = {"shard": None, "shape": None, "broken": broken}
        if latents is not None:
            shard = write_shard(self._store, number, latents[: len(labels)], torch.tensor(labels))
            note |= {"shard": dataclasses.asdict(shard), "shape": list(latents.shape[1:])}
        write_json(self._note(number), note)

    def _begun(self, batches: Iterator[Decoded]) -> Iterator[tuple[Decoded, Encoding]]:
        """Each batch with its latents on their way."""
        for decoded in batches:
            pixels = decoded.pixels
            if self._options.flip == "stored":
                pixels = torch.stack((pixels, pixels.flip(2)), dim=1).flatten(0, 1)
            kind = "mean_std" if self._options.kind == "sample" else self._options.kind
            yield decoded, self._autoencoder.encode(pixels, kind) if decoded.images else Encoding(torch.empty(0))

    def _rows(self, decoded: Decoded, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Latents as they are stored, with their labels."""
        images = torch.tensor(decoded.images)
        if self._options.kind == "sample":
            mean, std = moments.chunk(2, dim=1)
            ids = (images[:, None] * self._views + torch.arange(self._views)).flatten()
            moments = mean + std * normals(self._options.seed, Purpose.ENCODE, Stream.POSTERIOR, ids, mean.shape[1:])
        of_all = self._pictures.labels
        labels = torch.tensor([0 if of_all is None else of_all[i] for i in decoded.images])
        stored = moments.to(DTYPES[self._options.dtype]), labels.repeat_interleave(self._views)
        try:
            return next(checked([stored], self._pictures.num_classes))
        except DataError as error:
            raise DataError(f"{self._src}: images {decoded.images[0]} to {decoded.images[-1]}: {error}") from error

    @property
    def _views(self) -> int:
        return 2 if self._options.flip == "stored" else 1

    def _broken_before(self) -> list[tuple[str, str]]:
        """Images that are broken in shards that are finished."""
        return [image for file in sorted(self._work.glob("shard-*.json")) for image in read_json(file)["broken"]]

    def _check_broken(self, broken: list[tuple[str, str]]) -> None:
        if len(broken) > self._options.max_broken:
            raise DataError(
                f"{self._src}: {len(broken):,} images are broken, allowed up to {self._options.max_broken} "
                f"(max_broken); first {_told(broken[0])}"
            )

    def _contact_sheet(self, broken: set[str]) -> bytes:
        """Images spread over the store, and what is decoded of their rows."""
        there = [i for i, name in enumerate(self._pictures.names) if name not in broken]
        chosen = sorted({round(n * (len(there) - 1) / (_SHOWN - 1)) for n in range(_SHOWN)})
        originals = [decode(self._pictures.read(there[place]), self._options.size) for place in chosen]
        rows = LatentStore(self._store, verify=False).gather(torch.tensor(chosen) * self._views)
        decoded = [self._autoencoder.decode(row[None, : self._autoencoder.channels])[0].numpy() for row in rows]
        return contact_sheet(originals, decoded)


def _one_behind(items: Iterator[_Item]) -> Iterator[_Item]:
    """Each item when the next one is there, so that a GPU always has something to do."""
    previous: list[_Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _told(image: Sequence[str]) -> str:
    name, reason = image
    return f"{name} ({reason})"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"nproc-per-node: given {os.environ.get('LOCAL_WORLD_SIZE')}, "
            f"allowed up to {torch.cuda.device_count()}, the GPUs of this machine"
        )
    return torch.device("cuda", local)


def _settings(src: Path, pictures: Pictures, autoencoder: Autoencoder, options: EncodeOptions) -> dict[str, Any]:
    """What the bytes of the store depend on."""
    fields = {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE}
    return {
        "source": src.resolve().name,
        "images": len(pictures),
        "identity": pictures.identity,
        "vae": autoencoder.name,
        **fields,
    }


def _finished(dst: Path, settings: dict[str, Any]) -> LatentStore | None:
    if not dst.exists():
        return None
    note = dst / "encode.json"
    if not note.is_file() or read_json(note)["settings"] != settings:
        raise DataError(f"{dst} exists already; stores are never changed, so name a new folder")
    shutil.rmtree(_work_folder(dst), ignore_errors=True)  # killed after the rename
    print(f"{dst} is finished")
    return LatentStore(dst, verify=False)


def _work_folder(dst: Path) -> Path:
    return dst.parent / f".{dst.resolve().name}.encoding"


def _check_settings(file: Path, settings: dict[str, Any], dst: Path) -> None:
    if not file.is_file():
        write_json(file, settings)
        return
    begun = read_json(file)
    for name in settings:
        if begun.get(name) != settings[name]:
            raise DataError(
                f"{dst} was begun with {name} {begun.get(name)!r}, given {settings[name]!r}: "
                f"go on with that, or remove {file.parent} to begin anew"
            )


@contextlib.contextmanager
def _only_process(file: Path, dst: Path) -> Iterator[None]:
    with open(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is encoding into {dst}; wait for it, or name another folder") from None
        yield


@contextlib.contextmanager
def _last_process(work: Path, dst: Path) -> Iterator[bool]:
    """Whether this process is to make the store, and no other one did."""
    try:
        lock = open(work / "finish.lock", "w")  # noqa: SIM115
    except FileNotFoundError:  # another one has, and the folder is gone
        yield False
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not dst.exists()
