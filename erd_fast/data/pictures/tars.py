"""Images in tar files, which are indexed once by their headers; nothing is unpacked."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from erd_fast.data.foreign import class_number
from erd_fast.data.pictures.pictures import SUFFIXES, Pictures, is_image
from erd_fast.errors import DataError

_BLOCK = 512


class _Image(NamedTuple):
    """Where an image lies."""

    name: str
    archive: int
    begin: int
    size: int


class _Sample(NamedTuple):
    """What a WebDataset has of one key."""

    key: str
    images: list[_Image]
    label: int | None


def open_tar(src: Path) -> Pictures:
    """One tar file: a tar of tars, each of which is a class, or a shard of a WebDataset."""
    with _opened(src) as archive:
        first = next(_files(src, archive), None)
    if first is not None and first.name.endswith(".tar"):
        return _tar_of_tars(src)
    return open_tars([src])


def open_tars(tars: Sequence[Path]) -> Pictures:
    """Shards of a WebDataset: ``key.jpg`` and ``key.cls``, a number in ASCII, one after the other. Other files of a
    sample are passed over."""
    images: list[_Image] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        for sample in _samples(tar, number):
            images += sample.images
            labels += [] if sample.label is None else [sample.label]
            if len(labels) not in (0, len(images)):
                has = "no" if sample.label is None else "a"
                raise DataError(
                    f"{tar}: sample {sample.key} has {has} .cls, unlike those before it; allowed all or none"
                )
    # Keys may be the same in two shards.
    names = [f"{tars[image.archive].name}/{image.name}" if len(tars) > 1 else image.name for image in images]
    return _pictures(tars, names, images, labels or None, ())


def _tar_of_tars(src: Path) -> Pictures:
    by_class: dict[str, list[_Image]] = {}
    with _opened(src) as archive:
        for inner in _files(src, archive):
            if not inner.name.endswith(".tar"):
                raise DataError(f"{src}: given {inner.name} among tar files, allowed tar files alone")
            where = f"{src}, {inner.name}"
            with _opened(where, archive.extractfile(inner)) as within:
                by_class[Path(inner.name).stem] = sorted(
                    _Image(file.name, 0, inner.offset_data + file.offset_data, file.size)
                    for file in _files(where, within)
                    if is_image(file.name)
                )
    classes = sorted(by_class)
    names = [f"{name}/{image.name}" for name in classes for image in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    images = [image for name in classes for image in by_class[name]]
    return _pictures([src], names, images, labels, tuple(classes))


def _pictures(
    tars: Sequence[Path],
    names: Sequence[str],
    images: Sequence[_Image],
    labels: Sequence[int] | None,
    class_names: tuple[str, ...],
) -> Pictures:
    places = np.array([image[1:] for image in images], np.int64)  # a tenth of the memory

    def read(i: int) -> bytes:
        archive, begin, size = places[i].tolist()
        with open(tars[archive], "rb", buffering=0) as stream:  # of its own, so that no thread waits for another
            return os.pread(stream.fileno(), size, begin)

    return Pictures(names, [image.size for image in images], labels, class_names, read)


def _samples(tar: Path, number: int) -> Iterator[_Sample]:
    """Of those that have an image, in order."""
    sample = _Sample("", [], None)
    with _opened(tar) as archive, open(tar, "rb") as stream:
        for file in _files(tar, archive):
            folder, slash, name = file.name.rpartition("/")
            stem, _, suffix = name.lower().partition(".")
            key = folder + slash + name[: len(stem)]
            if key != sample.key:
                if sample.images:
                    yield sample
                sample = _Sample(key, [], None)
            if suffix == "cls":
                stream.seek(file.offset_data)
                sample = sample._replace(label=_label(f"{tar}: {file.name}", stream.read(file.size)))
            elif f".{suffix}" in SUFFIXES and stem:
                sample.images.append(_Image(file.name, number, file.offset_data, file.size))
                if len(sample.images) > 1:
                    both = " and ".join(image.name for image in sample.images)
                    raise DataError(f"{tar}: sample {key} has two images, {both}; allowed one")
    if sample.images:
        yield sample


def _label(where: str, text: bytes) -> int:
    if not text.strip().isdigit():
        raise DataError(f"{where}: given {text[:20]!r}, allowed a whole number, 0 or more, in ASCII")
    return class_number(int(text), where)


def _opened(where: object, content: IO[bytes] | None = None) -> tarfile.TarFile:
    try:
        return tarfile.open(str(where), "r:") if content is None else tarfile.open(fileobj=content, mode="r:")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where} cannot be read as a tar file: {error}") from error


def _files(where: object, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an archive in order, of which no list is kept: ImageNet's would take a gigabyte."""
    stream: Any = archive.fileobj
    end = stream.seek(0, os.SEEK_END)
    try:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]
            if info.isfile():
                if info.offset_data + info.size > end:
                    raise DataError(f"{where} is truncated: it ends within {info.name}")
                yield info
        stream.seek(archive.offset)
        if stream.read(_BLOCK).strip(b"\0"):  # tarfile takes a header that it does not understand for the end
            raise DataError(f"{where} is damaged: what comes after {archive.offset:,} bytes is no file")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where} is damaged: {error}") from error
